"""What the report says of rows, and the runner that makes them."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from benchmarks import report, run
from benchmarks.bars import verdicts
from benchmarks.environment import cpu_model
from benchmarks.linear import FROZEN
from benchmarks.plot import CHOSEN, COLORS, MOST_ROWS, TARGET, shown_rows
from benchmarks.run import Leg, environment, joined, legs, runs_here
from deepalign.kernels.library import cpu_isa

PEER = {"median_ms": 70.0, "p10_ms": 69.0, "p90_ms": 71.0, "ns_per_element": 8.5, "ratio_p10": 8.5, "ratio_p90": 20.5}


def timed_row(**changes: Any) -> dict[str, Any]:
    row = {
        "operation": "completion_loss",
        "case": "bfloat16-64x128256",
        "mode": "forward_backward",
        "implementation": "cpu",
        "device": "cpu",
        "isa": "avx512",
        "torch_isa": "avx512",
        "threads": 1,
        "allocator": "kept",
        "rounds": 9,
        "median_ms": 4.1,
        "p10_ms": 4.0,
        "p90_ms": 4.2,
        "ns_per_element": 0.5,
        "peers_page_faults_per_round": 3,
        "peers": {"eager": {**PEER, "ratio": 17.25}, "compile": {**PEER, "ratio": 8.75}},
    }
    return row | changes


def memory_row(**changes: Any) -> dict[str, Any]:
    row = timed_row(case="bfloat16-256x128256", allocator="returned", peak_extra_logits=1.04, **changes)
    del row["peers"]
    return row


def result_of(*rows: dict[str, Any]) -> dict[str, Any]:
    versions = {"python": "3.11.7", "torch": "2.13.0", "libc": "glibc 2.36"}
    return {
        "commit_info": {"id": "c0ffee", "dirty": False},
        "machine_info": {"deepalign": {"cpu_model": "A CPU", "cores": 2, "versions": versions}},
        "datetime": "2026-11-24T04:51:00",
        "benchmarks": [{"extra_info": row, "stats": {"median": 1.0, "data": [1.0]}} for row in rows],
    }


def judged(row: dict[str, Any]) -> dict[str, bool]:
    return {verdict.name: verdict.met for verdict in verdicts(row)}


def test_speed_is_judged_where_a_bar_stands() -> None:
    assert judged(timed_row()) == {"eager": True, "compile": False}
    assert judged(timed_row(case="float32-64x128256")) == {"eager": True, "compile": True}
    for elsewhere in ({"isa": "avx2"}, {"threads": 2}, {"implementation": "reference"}, {"case": "bfloat16-2x2004"}):
        assert judged(timed_row(**elsewhere)) == {}, elsewhere
    assert judged(timed_row(case="bfloat16-64x128256-ascending")) == {}
    forward = {"eager": {**PEER, "ratio": 20.0}, "forward_backward": {**PEER, "ratio": 1.4}}
    assert judged(timed_row(mode="forward", peers=forward, isa="avx2")) == {"forward_backward": False}
    sampler = timed_row(operation="contrastive_sample", case="bfloat16-1x128256")
    assert judged(sampler | {"mode": "top_k"}) == {"eager": False}
    assert judged(sampler | {"mode": "none"}) == {}


def test_memory_is_judged_by_mode() -> None:
    assert judged(memory_row()) == {"memory": True}
    assert judged(memory_row(mode="forward_backward_inplace")) == {"memory": False}
    assert judged(memory_row(implementation="eager")) == {}


def linear_row(**changes: Any) -> dict[str, Any]:
    peers = {f"products_{name}": {**PEER, "ratio": ratio} for name, ratio in (("native_bf16", 0.95), ("blocks", 0.8))}
    row = timed_row(operation="linear_completion_loss", case=str(FROZEN), peers=peers)
    return row | changes


def linear_memory_row(implementation: str, peak: float) -> dict[str, Any]:
    row = linear_row(implementation=implementation, mode="peak_memory")
    del row["peers"]
    return row | {"peak_extra_mib": peak, "eager_mib": {"eager_float32": 1200.0, "eager_rounded": 600.0}}


def test_the_linear_loss_is_judged_beside_bare_products_and_eagers_memory() -> None:
    assert judged(linear_row()) == {"products_native_bf16": True, "products_blocks": False}
    without_native = linear_row(peers={"products_blocks": {**PEER, "ratio": 2.0}})
    assert judged(without_native) == {"products_blocks": True}
    assert judged(linear_row() | {"case": "bfloat16-8x64x2004-frozen"}) == {}
    assert judged(linear_memory_row("linear", 199.0)) == {"eager_float32 memory": True}
    assert judged(linear_memory_row("linear", 201.0)) == {"eager_float32 memory": False}
    assert judged(linear_memory_row("linear_64", 900.0)) == {}
    text = report.markdown(result_of(linear_row(), linear_memory_row("linear", 199.0)))
    assert "| linear | 199 | 1200 | 600 | eager_float32 memory 6.03 against 6: met |" in text
    assert "products_blocks 0.8 against 0.909: missed" in text
    assert shown_rows([linear_row()]) == []  # the plot is of ratios to eager and compiled peers


def test_the_table_holds_rows_circumstances_and_what_was_missed() -> None:
    text = report.markdown(result_of(timed_row(), timed_row(threads=2), memory_row()))
    line = next(line for line in text.splitlines() if line.startswith("| bfloat16-64x128256 "))
    assert "| 1 | 4.1 | 0.5 | 17.2 (8.5 to 20.5) | 8.75 (8.5 to 20.5) |" in line
    assert "eager 17.2 against 17: met; compile 8.75 against 9: missed" in line
    assert "Commit c0ffee, 2026-11-24T04:51" in text
    for circumstance in ("A CPU, 2 cores", "torch 2.13.0", "Allocator of times: kept; ", "at most 3"):
        assert circumstance in text
    assert "| 1.040 | returned | memory 1.04 against 1.05: met |" in text
    assert (
        "2 of 3 bars met:\n\n- completion_loss bfloat16-64x128256 forward_backward, cpu, avx512, threads 1: com" in text
    )


def test_a_busy_machine_is_called_busy() -> None:
    steady = {**PEER, "ratio": 20.0, "ratio_p10": 20.0, "ratio_p90": 21.0}
    text = report.markdown(result_of(timed_row(peers={"eager": steady, "compile": steady})))
    assert "1.05 (median of all): a quiet machine" in text
    assert "2.41 (median of all): a BUSY machine" in report.markdown(result_of(timed_row()))


def test_uncommitted_changes_are_named() -> None:
    result = result_of(timed_row())
    result["commit_info"]["dirty"] = True
    assert "Commit c0ffee with uncommitted changes" in report.markdown(result)


def test_a_file_of_another_suite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "other.json"
    source.write_text(json.dumps({"benchmarks": [{"extra_info": {}}]}), encoding="utf-8")
    with pytest.raises(SystemExit):
        report.main([str(source)])
    assert "has no rows of this suite" in capsys.readouterr().err


def test_the_plot_shows_one_thread_and_the_reference_only_where_it_is_alone() -> None:
    alone = timed_row(operation="contrastive_sample", implementation="reference", mode="top_k")
    rows = [timed_row(), timed_row(threads=2), timed_row(implementation="reference"), timed_row(mode="forward"), alone]
    assert shown_rows([*rows, memory_row()]) == [rows[0], alone]


def test_of_many_rows_the_plot_shows_chosen_ones_and_one_on_other_instruction_sets() -> None:
    keys = [dict(zip(("operation", "case", "mode"), key, strict=True)) for key in CHOSEN]
    others = [{"case": f"bfloat16-{n}x2004"} for n in range(MOST_ROWS + 1)]
    rows = [timed_row(**key, isa=isa) for isa in ("avx512", "avx2") for key in [*others, *reversed(keys)]]
    found = [(row["isa"], row["operation"], row["case"], row["mode"]) for row in shown_rows(rows)]
    expected = [("avx512", *key) for key in CHOSEN]
    assert found == [expected[0], ("avx2", *expected[0][1:]), *expected[1:]]
    assert shown_rows(rows[: len(others)]) == rows[:MOST_ROWS]  # none of them is chosen


def test_the_committed_plot_fits_a_page() -> None:
    folder = Path(report.__file__).parent / "results"
    rows = report.rows_of(json.loads((folder / "cpu.json").read_text(encoding="utf-8")))
    assert len(CHOSEN) < len(shown_rows(rows)) <= MOST_ROWS
    height, width, _ = matplotlib.image.imread(folder / "cpu.png").shape
    assert height <= width <= 1650
    assert height < 1100


def tallest(path: Path, color: str) -> int:
    """Most pixels of a color in one column: a bar or an upright line, not the name of one in the legend."""
    image_HWC = matplotlib.image.imread(path)[..., :3]
    found_HW = np.abs(image_HWC - matplotlib.colors.to_rgb(color)).max(axis=-1) < 0.05
    return int(found_HW.sum(axis=0).max())


def test_the_plot_draws_bars_and_targets(tmp_path: Path) -> None:
    counts = {}
    for name, rows in {"target": [timed_row()], "none": [timed_row(case="bfloat16-64x128127")]}.items():
        source = tmp_path / f"{name}.json"
        source.write_text(json.dumps(result_of(*rows)), encoding="utf-8")
        written = report.write_report(source)
        assert [path.name for path in written] == [f"{name}.md", f"{name}.png"]
        counts[name] = (tallest(written[1], COLORS["avx512"]), tallest(written[1], TARGET))
    assert counts["target"][0] > 25
    assert counts["target"][1] > 25
    assert counts["none"][0] > 25
    assert counts["none"][1] == 0


def test_memory_alone_has_no_plot(tmp_path: Path) -> None:
    source = tmp_path / "memory.json"
    source.write_text(json.dumps(result_of(memory_row())), encoding="utf-8")
    assert [path.name for path in report.write_report(source)] == ["memory.md"]


def test_legs_vary_threads_on_the_best_instruction_set_only() -> None:
    assert legs(["avx512", "avx2"], [1, 2]) == [Leg("avx512", 1), Leg("avx512", 2), Leg("avx2", 1, native_only=True)]
    assert legs([], [1, 2]) == [Leg("", 1), Leg("", 2)]


def test_a_legs_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPALIGN_CPU_ISA", "portable")
    found = environment(Leg("avx2", 2), seconds=0.5, quick=True)
    assert found["DEEPALIGN_CPU_ISA"] == "avx2"
    assert (found["OMP_NUM_THREADS"], found["DEEPALIGN_BENCH_SECONDS"]) == ("2", "0.5")
    assert "DEEPALIGN_CPU_ISA" not in environment(Leg("", 1), seconds=1, quick=False)


def test_joined_keeps_every_row_and_drops_single_rounds() -> None:
    whole = joined([result_of(timed_row()), result_of(timed_row(isa="avx2"))])
    assert [row["extra_info"]["isa"] for row in whole["benchmarks"]] == ["avx512", "avx2"]
    assert [row["stats"] for row in whole["benchmarks"]] == [{"median": 1.0, "data": []}] * 2
    assert whole["commit_info"]["id"] == "c0ffee"


def test_the_cpu_is_named_with_family_and_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    first = "processor : 0\nvendor_id : X\ncpu family : 26\nmodel : 2\nmodel name : Some CPU: fast\nflags : a b\n"
    listing.write_text(f"{first}\n{first.replace('26', '27')}", encoding="utf-8")
    monkeypatch.setattr("benchmarks.environment.CPUINFO", listing)
    assert cpu_model() == "Some CPU: fast family 26 model 2"
    monkeypatch.setattr("benchmarks.environment.CPUINFO", tmp_path / "missing")
    assert cpu_model()


def test_a_selection_of_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "play", lambda *_: None)
    monkeypatch.setattr(run, "runs_here", lambda isa: isa == "avx2")
    with pytest.raises(SystemExit):
        run.main(["--select", "nonsense"])
    seen = capsys.readouterr()
    assert seen.out.splitlines() == ["== avx2, 1 thread"]
    assert "'nonsense' matches no benchmark" in seen.err
    with pytest.raises(SystemExit):
        run.main(["--full", "--select", "nonsense"])
    assert capsys.readouterr().out.splitlines() == ["== avx2, 1 thread", "== avx2, 2 threads"]


def test_runner_and_report_from_end_to_end(tmp_path: Path) -> None:
    assert not runs_here("imaginary")
    out = tmp_path / "deep" / "cpu.json"
    options = ["--quick", "--seconds=0.01", "--threads", "2", "--isa", "portable", f"--out={out}"]
    # both implementations of one, and of the loss, whose peers take long to compile, the one that users get
    worst = f"worst and 128127 and {'cpu' if cpu_isa() else 'reference'}"
    run.main([*options, "--full", "--select", f"favored and 32000 or {worst}"])
    whole = json.loads(out.read_text(encoding="utf-8"))
    rows = report.rows_of(whole)
    assert {row["operation"] for row in rows} == {"base_favored_tokens", "completion_loss"}
    for row in rows:
        assert row["threads"] == 2
        assert row["allocator"].startswith("glibc, M_MMAP_MAX=0") or sys.platform != "linux"
        assert row["rounds"] >= 7
        assert row["peers"]["eager"]["ratio"] > 0
        assert row["useful_gbps"] > 0
        assert max(row["error"].values()) < 0.01
        assert row["isa"] == ("portable" if row["implementation"] == "cpu" else row["torch_isa"])
    assert ("cpu" in {row["implementation"] for row in rows}) == (cpu_isa() is not None)
    report.main([str(out)])
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "## completion_loss" in out.with_suffix(".md").read_text(encoding="utf-8")


def test_the_readme_gets_its_rows(tmp_path: Path) -> None:
    result = result_of(timed_row(), timed_row(isa="avx2", median_ms=9.0), timed_row(threads=2, median_ms=2.0))
    table = report.readme_table(result)
    assert "| loss + gradient, 64 x 128256 (Llama 3) | 4.1 ms | 17.2x | 8.8x |" in table
    assert "9 ms" not in table
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.write_readme(readme, table)
    assert readme.read_text(encoding="utf-8") == f"before\n{table}\nafter\n"
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="has no marks"):
        report.write_readme(readme, table)

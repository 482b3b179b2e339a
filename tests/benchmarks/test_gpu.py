"""The GPU benchmark runs end to end, at tiny sizes on the CPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_once
from benchmarks.gpu import main


@pytest.mark.parametrize("what", ["loss", "sampler", "linear"])
def test_every_row_is_measured_and_saved(what: str, tmp_path: Path) -> None:
    out = tmp_path / "results" / "gpu.json"
    assert main([what, "--out", str(out), "--device", "cpu", "--tiny", "--peers", "eager", "--rounds", "2"]) == 0
    result = json.loads(out.read_text())
    assert result["tiny"] is True
    contestants = {row["contestant"] for row in result["rows"]}
    assert (
        contestants == {"library", "library, recompute", "bare products", "eager, chunked"}
        if what == "linear"
        else {"reference", "eager"} <= contestants
    )
    for row in result["rows"]:
        if what == "loss":
            assert row["ms"] > 0
            assert row["share_of_copy"] == pytest.approx(row["useful_gb_per_s"] / row["copy_gb_per_s"])
        elif what == "linear":
            assert row["tflop_per_s"] > 0
        else:
            assert row["us"] > 0
    if what == "loss":
        assert {row["mode"] for row in result["rows"]} == {"forward", "forward_backward", "forward_backward_inplace"}
        assert "upstream 2" in contestants


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["loss", "--out", str(tmp_path / "x.json")]) == 2
    assert "no GPU here" in capsys.readouterr().err


def test_every_kernel_runs_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_once.main(["--rows", "2", "--vocab", "300", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 + 3 + len(gpu_once.SAMPLES)
    assert gpu_once.main(["--rows", "2", "--vocab", "300", "--device", "cpu", "--calls", "loss {}", "forward"]) == 0
    assert capsys.readouterr().out.splitlines() == ["loss {}", "forward"]


def test_what_is_measured_before_it_fails_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(options: object) -> Iterator[dict[str, object]]:
        yield {"shape": [1, 2], "mode": "forward", "contestant": "reference", "ms": 1.0}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "loss_rows", rows)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["loss", "--out", str(tmp_path / "gpu.json"), "--device", "cpu", "--tiny"])
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 1


def test_who_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*models: object) -> None:
        raise MemoryError("18 temporaries")

    monkeypatch.setattr(gpu, "loss_peers", lambda: {"eager": too_large})
    out = tmp_path / "gpu.json"
    assert main(["loss", "--out", str(out), "--device", "cpu", "--tiny", "--peers", "eager", "--rounds", "1"]) == 1
    result = json.loads(out.read_text())
    assert len([row for row in result["rows"] if row["contestant"] == "reference"]) == 3
    assert result["failures"] == ["eager: MemoryError: 18 temporaries"] * 2

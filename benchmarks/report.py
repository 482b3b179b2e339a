"""A table and a plot of a benchmark JSON, beside it: `python -m benchmarks.report benchmarks/results/cpu.json`."""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bars import verdicts
from benchmarks.plot import plot_ratios, shown_rows

PEERS = {
    "eager": "eager",
    "eager_tuned": "tuned eager",
    "compile": "compile",
    "compile_tuned": "tuned compile",
    "forward_backward": "forward + backward",
    "generate": "transformers' generate",
    "generate_tuned": "the same, dense heads",
    "two_forwards": "two forwards",
    "products_native_bf16": "bare products, native",
    "products_blocks": "bare products, converted blocks",
    "products_rounded_bf16": "bare products rounded to bf16",
}
QUIET = 1.15  # measured with nothing else running: 1.03 to 1.1
NOTES = """\
Every row was measured in one process, everybody called once per round, in turn. A ratio is how many times this row's
time the peer takes: the median over rounds of the ratio within a round (10th to 90th percentile). The library is
called through its public functions, the loss with `.backward()` unless forward only. "eager" and "compile" are a
straightforward PyTorch version and the same under `torch.compile` (static shapes); "tuned" ones go as fast as PyTorch
was made to go, with a gradient in closed form; "forward + backward" is this row's own. Of sampling_generate an
element is a token; "transformers' generate" runs Eq. 7 eagerly in a logits processor, and with "dense heads" it is
spared what torch does with a strided hidden state. Of sampling_step "two forwards" are those that the draw comes on
top of. torch's kernels keep their own instruction set, whatever the row's is. "useful GB/s" counts every input and a
gradient once, over the row's time, beside a copy of 256 MiB on as many threads in the same process. Errors are
against float64 on the first two rows: of the loss relative to 1 + its value, of the gradient relative to its largest
entry (bf16 rounds to 0.2%), of other results relative to 1 + their value, with the number of integers that differ; in
parentheses eager's. Bars are targets that this project set itself (`benchmarks/bars.py`).
"""


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a JSON that pytest-benchmark saved.

    Raises:
        ValueError: the JSON has no rows of this suite.
    """
    rows = [entry["extra_info"] for entry in result.get("benchmarks", []) if "operation" in entry["extra_info"]]
    if not rows:
        raise ValueError("the JSON has no rows of this suite; expected one that `python -m benchmarks.run` wrote")
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    rows = rows_of(result)
    timed = [row for row in rows if "peers" in row]
    parts = ["# Benchmarks", _circumstances(result, rows), NOTES]
    for operation in dict.fromkeys(row["operation"] for row in timed):
        parts += [f"## {operation}", _time_table([row for row in timed if row["operation"] == operation])]
    if memory := [row for row in rows if "peak_extra_logits" in row]:
        parts += ["## Peak extra memory of completion_loss, in units of one logits tensor", _memory_table(memory)]
    if memory := [row for row in rows if "peak_extra_mib" in row]:
        parts += ["## Peak extra memory of linear_completion_loss, MiB", _linear_memory_table(memory)]
    if judged := [(row, verdict) for row in rows for verdict in verdicts(row)]:
        missed = [f"- {_name(row)}: {verdict}" for row, verdict in judged if not verdict.met]
        summary = f"{len(judged) - len(missed)} of {len(judged)} bars met" + (":" if missed else ".")
        parts += ["## Bars", "\n".join([summary, "", *missed]).rstrip()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _circumstances(result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    commit, machine = result["commit_info"], result["machine_info"]["deepalign"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    faults = max((row["peers_page_faults_per_round"] for row in rows if "peers" in row), default=0)
    return "\n".join(
        [
            f"- Commit {commit.get('id', 'unknown')}{' with uncommitted changes' if commit.get('dirty') else ''}, "
            f"{result['datetime'][:16]}",
            f"- {machine['cpu_model']}, {machine['cores']} cores; {versions}",
            f"- torch's own kernels: {_distinct(row['torch_isa'] for row in rows)}; "
            f"devices: {_distinct(row['device'] for row in rows)}",
            f"- Allocator of times: {_distinct(row['allocator'] for row in rows if 'peers' in row)}; the peers' page "
            f"faults per round (median): at most {faults:.0f}",
            *_noise(rows),
        ]
    )


def _noise(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far rounds differed: ratios of a busy machine are not worth much, and the report should say so."""
    peers = [peer for row in rows for peer in row.get("peers", {}).values()]
    if not peers:
        return []
    width = statistics.median(peer["ratio_p90"] / peer["ratio_p10"] for peer in peers)
    verdict = "a quiet machine" if width < QUIET else "a BUSY machine: measure again"
    return [f"- Spread of ratios over rounds, 90th against 10th percentile: {width:.2f} (median of all): {verdict}"]


def _time_table(rows: Sequence[dict[str, Any]]) -> str:
    peers = [name for name in PEERS if any(name in row["peers"] for row in rows)]
    header = ["case", "mode", "implementation", "threads", "ms", "ns/element"]
    header += [*(PEERS[name] for name in peers), "useful GB/s", "error", "bars"]
    lines = []
    for row in rows:
        ratios = [_ratio(row["peers"][name]) if name in row["peers"] else "" for name in peers]
        times = [str(row["threads"]), f"{row['median_ms']:.3g}", f"{row['ns_per_element']:.3g}"]
        bars = "; ".join(map(str, verdicts(row)))
        measured = [_traffic(row), _errors(row)]
        lines.append([row["case"], row["mode"], _implementation(row), *times, *ratios, *measured, bars])
    return _table(header, lines)


def _traffic(row: dict[str, Any]) -> str:
    return f"{row['useful_gbps']:.3g} ({row['percent_of_copy']:.0f}% of copy)" if "useful_gbps" in row else ""


def _errors(row: dict[str, Any]) -> str:
    if "error" not in row:
        return ""
    of_eager = row.get("eager_error", {})
    return ", ".join(
        f"{name} {value:.2g}" + (f" ({of_eager[name]:.2g})" if name in of_eager else "")
        for name, value in row["error"].items()
    )


def _memory_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["case", "mode", "who", "peak extra", "allocator", "bars"]
    lines = [
        [
            row["case"],
            row["mode"],
            row["implementation"],
            f"{row['peak_extra_logits']:.3f}",
            row["allocator"],
            "; ".join(map(str, verdicts(row))),
        ]
        for row in rows
    ]
    return _table(header, lines)


def _linear_memory_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["case", "who", "peak extra", *(name.replace("_", ", ") for name in rows[0]["eager_mib"]), "bars"]
    lines = [
        [row["case"], row["implementation"], f"{row['peak_extra_mib']:.0f}"]
        + [f"{value:.0f}" for value in row["eager_mib"].values()]
        + ["; ".join(map(str, verdicts(row)))]
        for row in rows
    ]
    return _table(header, lines)


README_CASES = {
    ("completion_loss", "bfloat16-64x128256", "forward_backward"): "loss + gradient, 64 x 128256 (Llama 3)",
    ("completion_loss", "bfloat16-16x151936", "forward_backward"): "loss + gradient, 16 x 151936 (Qwen2.5)",
    ("completion_loss", "bfloat16-64x32000", "forward_backward"): "loss + gradient, 64 x 32000 (Llama 2)",
    ("completion_loss", "float32-64x128256", "forward_backward"): "loss + gradient, fp32, 64 x 128256",
    ("position_divergence", "bfloat16-64x128256", "forward"): "position statistics, 64 x 128256",
    ("base_favored_tokens", "bfloat16-64x128256", "forward"): "base-favored tokens, 64 x 128256",
    ("contrastive_sample", "bfloat16-1x128256", "top_k+top_p"): "contrastive sample, 1 x 128256",
}
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def readme_table(result: dict[str, Any]) -> str:
    """The few rows of the README, on one thread and the best instruction set, with what they were measured on."""
    machine, rows = result["machine_info"]["deepalign"], rows_of(result)
    found = {(row["operation"], row["case"], row["mode"]): row for row in reversed(rows) if _is_best(row, rows)}
    lines = []
    for key, label in README_CASES.items():
        if (row := found.get(key)) is not None:
            ratios = [f"{row['peers'][peer]['ratio']:.1f}x" if peer in row["peers"] else "" for peer in PEERS_SHOWN]
            lines.append([label, f"{row['median_ms']:.3g} ms", *ratios])
    where = f"{machine['cpu_model']}, one thread, {_best_isa(rows)}; torch {machine['versions']['torch']}"
    table = _table(["tokens x vocabulary, bf16 unless said", "deepalign", "vs eager", "vs torch.compile"], lines)
    return f"{BEGIN}\n{table}\n\n*{where}; [all rows, bars met and missed](benchmarks/results/cpu.md).*\n{END}"


PEERS_SHOWN = ("eager", "compile")


def _best_isa(rows: Sequence[dict[str, Any]]) -> str:
    return next((row["isa"] for row in rows if row["implementation"] == "cpu"), "")


def _is_best(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
    return row["implementation"] == "cpu" and row["threads"] == 1 and row["isa"] == _best_isa(rows) and "peers" in row


def write_readme(readme: Path, table: str) -> None:
    """Put the table between its marks.

    Raises:
        ValueError: `readme` has no such marks.
    """
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme} has no marks {BEGIN} and {END}; put them where the table should be")
    readme.write_text(text[: text.index(BEGIN)] + table + text[text.index(END) + len(END) :], encoding="utf-8")


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def _ratio(peer: dict[str, float]) -> str:
    return f"{peer['ratio']:.3g} ({peer['ratio_p10']:.3g} to {peer['ratio_p90']:.3g})"


def _implementation(row: dict[str, Any]) -> str:
    return f"{row['implementation']}, {row['isa']}" if row["implementation"] == "cpu" else row["implementation"]


def _name(row: dict[str, Any]) -> str:
    return f"{row['operation']} {row['case']} {row['mode']}, {_implementation(row)}, threads {row['threads']}"


def _distinct(values: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(values)) or "none"


def write_report(source: Path) -> list[Path]:
    """Write `source` with the suffixes .md and, if anything was timed, .png; return the paths.

    Raises:
        ValueError: not JSON of this suite.
    """
    result = json.loads(source.read_text(encoding="utf-8"))
    text, rows = markdown(result), rows_of(result)
    table, plot = source.with_suffix(".md"), source.with_suffix(".png")
    if not shown_rows(rows):
        table.write_text(text, encoding="utf-8")
        return [table]
    table.write_text(f"{text}\n![Ratios]({plot.name})\n", encoding="utf-8")
    plot_ratios(plot, rows)
    return [table, plot]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="JSON that `python -m benchmarks.run` or pytest-benchmark saved")
    parser.add_argument("--readme", type=Path, help="also put the few rows of the README into this file")
    options = parser.parse_args(arguments)
    source = options.source
    try:
        written = write_report(source)
        if options.readme:
            write_readme(options.readme, readme_table(json.loads(source.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        parser.error(f"{source}: {error}")
    print(f"wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main()

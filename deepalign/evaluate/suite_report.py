"""Tables laid out as the paper's, in Markdown, JSON and as bars.

A rate is a count with its 95% Wilson interval, with several seeds each one's, and their mean: answers of one seed are
no sample of other seeds, so no pooled interval is given. Scores over seeds are mean and standard deviation.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepalign.data.files import write_text_atomic
from deepalign.evaluate.bars import Bar, plot_bars
from deepalign.evaluate.gcg import mean_and_sd
from deepalign.evaluate.markdown import markdown_table
from deepalign.evaluate.outcomes import OUTCOMES
from deepalign.evaluate.prefill_run import agreement_table
from deepalign.evaluate.statistics import format_rate, wilson_interval
from deepalign.evaluate.tables import DEGENERATE, EXPERIMENTS, PREFILL, Cell, TableRow
from deepalign.versions import versions

# experiment -> seed -> rows
Results = Mapping[str, Mapping[int, Sequence[TableRow]]]


def write_suite_report(
    folder: str | Path,
    results: Results,
    *,
    config: Mapping[str, Any],
    seconds: Mapping[str, float],
    agreement: Sequence[dict[str, Any]] = (),
    judged: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write tables.md, tables.json and a plot per experiment with a prefill column; returns the path of tables.md.

    Args:
        folder: of the files.
        results: all rows.
        config: the suite's configuration, as plain values.
        seconds: what took how long.
        agreement: of judges, rows of `agreement.agreement_rows` with the subject's name.
        judged: every judge's counts where there were several: `subject`, `judge`, the outcomes and `n`.
    """
    folder = Path(folder)
    content = {
        "seeds": sorted({seed for by_seed in results.values() for seed in by_seed}),
        "versions": versions(),
        "seconds": dict(seconds),
        "experiments": {
            name: {str(seed): [vars(row) for row in rows] for seed, rows in by_seed.items()}
            for name, by_seed in results.items()
        },
        "agreement": list(agreement),
        "judged": list(judged),
        "config": config,
    }
    write_text_atomic(folder / "tables.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    sections = [_heading(content)]
    for name, by_seed in results.items():
        sections.append(_section(name, by_seed, folder))
    if judged:
        sections.append("## Every judge's verdicts\n\n" + _judged(judged))
    if agreement:
        sections.append("## Agreement of the judges\n\n" + _agreement(agreement))
    sections.append(_provenance(content))
    write_text_atomic(folder / "tables.md", "\n\n".join(sections) + "\n")
    return folder / "tables.md"


def format_cells(cells: Sequence[Cell]) -> str:
    """One cell of a table from the cells of all seeds."""
    kinds = {cell["kind"] for cell in cells}
    assert len(kinds) == 1, f"one column, several kinds: {kinds}"
    if kinds == {"rate"}:
        return _format_rates([(cell["k"], cell["n"]) for cell in cells])
    if kinds == {"spread"}:
        return "; ".join(_format_spread(cell) for cell in cells)
    values = [cell["value"] for cell in cells]
    if len(values) > 1:
        return _plus_minus(*mean_and_sd(values))
    return _plus_minus(values[0], cells[0]["stderr"])


def _format_rates(counts: Sequence[tuple[int, int]]) -> str:
    if len(counts) == 1:
        return format_rate(*counts[0])
    mean = sum(k / n for k, n in counts) / len(counts)
    sizes = {n for _, n in counts}
    listed = []
    for k, n in counts:
        low, high = wilson_interval(k, n)
        listed.append(f"{k if len(sizes) == 1 else f'{k}/{n}'} ({100 * low:.0f} to {100 * high:.0f}%)")
    return f"{100 * mean:.1f}%: {', '.join(listed)}{f' of {sizes.pop()}' if len(sizes) == 1 else ''}"


def _format_spread(cell: Cell) -> str:
    n = {pair[1] for pair in cell["counts"]}
    listed = ", ".join(str(pair[0]) for pair in cell["counts"])
    sd = "" if cell["sd"] is None else f" ± {100 * cell['sd']:.1f}"
    runs = len(cell["values"])
    return f"{100 * cell['mean']:.1f}{sd}% ({runs} runs of n = {', '.join(map(str, sorted(n)))}: {listed})"


def _plus_minus(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None or math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def _merged(by_seed: Mapping[int, Sequence[TableRow]]) -> dict[tuple[str, str], dict[str, list[Cell]]]:
    """(family, method) -> column -> the cells of all seeds."""
    merged: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for rows in by_seed.values():
        for row in rows:
            columns = merged.setdefault((row.family, row.method), {})
            for column, cell in row.cells.items():
                columns.setdefault(column, []).append(cell)
    return merged


def _section(name: str, by_seed: Mapping[int, Sequence[TableRow]], folder: Path) -> str:
    experiment, merged = EXPERIMENTS[name], _merged(by_seed)
    columns = list(dict.fromkeys(column for cells in merged.values() for column in cells))
    if experiment.layout == "columns":
        families = len({family for family, _ in merged}) > 1
        header = ["Response Category", *(f"{f}: {m}" if families else m for f, m in merged)]
        lines = [[c, *(format_cells(cells[c]) for cells in merged.values())] for c in columns]
    else:
        header = ["Model", "Method", *columns]
        lines = [
            [family, method, *(format_cells(cells[c]) if c in cells else "" for c in columns)]
            for (family, method), cells in merged.items()
        ]
    parts = [f"## {experiment.title}", markdown_table(header, lines)]
    if experiment.note:
        parts.append(experiment.note)
    if PREFILL in columns:
        # Of a table with more columns the plot is one column, and says so.
        number = experiment.title.partition(":")[0]
        title = experiment.title if experiment.layout == "bars" else f"{number}, its prefill column"
        _plot(folder / f"{name}.png", title, merged)
        parts.append(f"![{experiment.title}]({name}.png)")
    return "\n\n".join(parts)


def _plot(path: Path, title: str, merged: Mapping[tuple[str, str], Mapping[str, Sequence[Cell]]]) -> None:
    several = len({family for family, _ in merged}) > 1
    bars = []
    for (family, method), cells in merged.items():
        harmful, degenerate = ([(cell["k"], cell["n"]) for cell in cells[column]] for column in (PREFILL, DEGENERATE))
        bars.append(Bar(f"{family}\n{method}" if several else method, harmful, degenerate))
    plot_bars(path, bars, title=title, ylabel="answers under the prefill attack")


def _heading(content: Mapping[str, Any]) -> str:
    seeds = content["seeds"]
    counted = "Counts with 95% Wilson intervals" + ("." if len(seeds) == 1 else ", one per seed, after their mean.")
    return (
        f"# Tables\n\nSeeds: {', '.join(map(str, seeds))}. {counted} Arrows say which way is better. Harmful, refused "
        "and degenerate answers add up to n; HRR is the share of harmful answers to plain requests: lower is better."
    )


def _judged(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [row["subject"], row["judge"], *(format_rate(row[outcome], row["n"]) for outcome in OUTCOMES)] for row in rows
    ]
    return markdown_table(["answers of", "judge", *OUTCOMES], cells)


def _agreement(rows: Sequence[dict[str, Any]]) -> str:
    by_subject: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_subject.setdefault(row["subject"], []).append(row)
    return "\n\n".join(f"{subject}\n\n{agreement_table(found)}" for subject, found in by_subject.items())


def _provenance(content: Mapping[str, Any]) -> str:
    named = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in content["seconds"].items())
    config = json.dumps(content["config"], indent=2, ensure_ascii=False)
    return (
        f"## How it was made\n\n- versions: {named}\n- time: {seconds}\n- every answer: measurements/ in the folder of "
        f"each seed\n- configuration:\n\n```json\n{config}\n```"
    )

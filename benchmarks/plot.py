"""The ratios of a benchmark file as horizontal bars, with what is asked of them as lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.bars import speed_bars

PANELS = {
    "eager": "times faster than eager PyTorch (dot: than tuned eager)",
    "compile": "times faster than torch.compile (dot: than tuned compile)",
}
MODES = ("forward_backward", "forward_backward_inplace")
# Okabe and Ito's palette; every instruction set also has a place of its own within a group.
COLORS = {"avx512": "#0072B2", "avx2": "#CC8400", "portable": "#7a7a7a", "reference": "#CC79A7"}
ASKED = "#D55E00"
INK = "#333333"
THICKNESS = 0.8


def shown_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the plot: on the fewest threads; of the loss those with a gradient; the reference of an operation only
    where nothing else ran it."""
    timed = [row for row in rows if "peers" in row and row["threads"] == min(r["threads"] for r in rows)]
    timed = [row for row in timed if row["operation"] != "completion_loss" or row["mode"] in MODES]
    timed = [row for row in timed if any(peer in row["peers"] for peer in PANELS)]
    fused = {row["operation"] for row in timed if row["implementation"] != "reference"}
    return [row for row in timed if row["implementation"] != "reference" or row["operation"] not in fused]


def plot_ratios(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a PNG with one panel per peer, one group per case, one bar per instruction set or implementation; whiskers
    from the 10th to the 90th percentile over rounds, a dot at the ratio against the tuned peer."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in shown_rows(rows):
        groups.setdefault(_group(row), []).append(row)
    most = max(map(len, groups.values()))
    figure = Figure(figsize=(11, 1.4 + len(groups) * (0.15 + 0.18 * most)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS), sharey=True, squeeze=False)[0]
    for axes, (peer, label) in zip(panels, PANELS.items(), strict=True):
        _panel(axes, list(groups.values()), THICKNESS / most, peer)
        axes.set_xlabel(label, color=INK, fontsize=8)
    panels[0].set_yticks(range(len(groups)), list(groups), color=INK, fontsize=8)
    panels[0].set_ylim(len(groups) - 0.4, -0.6)
    named = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named, loc="outside upper right", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _panel(axes: Axes, groups: Sequence[list[dict[str, Any]]], height: float, peer: str) -> None:
    for center, rows in enumerate(groups):
        for place, row in enumerate(rows):
            _bar(axes, row, peer, center + (place - (len(rows) - 1) / 2) * height, height)
        for asked in {speed_bars(row)[peer] for row in rows if peer in speed_bars(row)}:
            reach = THICKNESS / 2 + 0.06
            axes.vlines(asked, center - reach, center + reach, color=ASKED, label="asked (avx512)")
    axes.axvline(1.0, color=INK, linewidth=0.6, dashes=(2, 2))
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _bar(axes: Axes, row: dict[str, Any], peer: str, at: float, height: float) -> None:
    if peer not in row["peers"]:
        return
    low, ratio, high = (row["peers"][peer][name] for name in ("ratio_p10", "ratio", "ratio_p90"))
    series = row["isa"] if row["implementation"] == "cpu" else row["implementation"]
    axes.barh(at, ratio, 0.9 * height, color=COLORS.get(series, INK), label=series)
    axes.errorbar(ratio, at, xerr=[[ratio - low], [high - ratio]], fmt="none", ecolor=INK, elinewidth=0.8)
    if tuned := row["peers"].get(f"{peer}_tuned"):
        axes.plot(tuned["ratio"], at, "o", color="white", markeredgecolor=INK, markersize=3.5)
        high = max(high, tuned["ratio"])
    axes.annotate(f"{ratio:.3g}", (high, at), (4, 0), textcoords="offset points", va="center", fontsize=7)


def _group(row: dict[str, Any]) -> str:
    inplace = ", in place" if row["mode"].endswith("inplace") else ""
    filters = f", {row['mode']}" if row["operation"] == "contrastive_sample" else ""
    return f"{row['operation']} {row['case']}{inplace}{filters}"

"""The ratios of a benchmark file as bars on a log axis, with this project's targets; the table has the other rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.bars import speed_bars

PEERS = {"eager": "eager PyTorch", "compile": "torch.compile"}
MODES = ("forward_backward", "forward_backward_inplace")
# Of a file with more rows than these, on the fewest threads: operation, case, mode -> name in the plot.
CHOSEN = {
    ("completion_loss", "bfloat16-64x128256", "forward_backward"): "loss, bf16, 64 x 128256",
    ("completion_loss", "bfloat16-16x151936", "forward_backward"): "loss, bf16, 16 x 151936",
    ("completion_loss", "bfloat16-16x256000", "forward_backward"): "loss, bf16, 16 x 256000",
    ("completion_loss", "bfloat16-64x32000", "forward_backward"): "loss, bf16, 64 x 32000",
    ("completion_loss", "float16-64x128256", "forward_backward"): "loss, fp16, 64 x 128256",
    ("completion_loss", "float32-64x128256", "forward_backward"): "loss, fp32, 64 x 128256",
    ("position_divergence", "bfloat16-64x128256", "forward"): "position statistics, 64 x 128256",
    ("base_favored_tokens", "bfloat16-64x128256", "forward"): "base-favored tokens, 64 x 128256",
    ("contrastive_sample", "bfloat16-1x128256", "none"): "sampler, 1 x 128256, no filter",
    ("contrastive_sample", "bfloat16-1x128256", "top_k"): "sampler, 1 x 128256, top k",
    ("contrastive_sample", "bfloat16-1x128256", "top_k+top_p"): "sampler, 1 x 128256, top k and p",
    ("contrastive_sample", "bfloat16-1x128256", "top_p"): "sampler, 1 x 128256, top p",
    ("contrastive_sample", "bfloat16-16x128256", "top_k+top_p"): "sampler, 16 x 128256, top k and p",
}
ALSO_ELSEWHERE = next(iter(CHOSEN))  # the row that other instruction sets are shown for
MOST_ROWS = 16
# Okabe and Ito's palette; a row of another instruction set than the first one's says so in its name too.
COLORS = {"avx512": "#0072B2", "avx2": "#CC8400", "portable": "#7a7a7a", "reference": "#CC79A7"}
SERIES = {"avx512": "AVX-512", "avx2": "AVX2"}
TARGET = "#D55E00"
INK = "#333333"
FAINT = "#dddddd"
THICKNESS = 0.62
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def shown_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the plot, at most `MOST_ROWS`, those with a ratio to one of `PEERS`: on the fewest threads; of the loss
    those with a gradient; the reference of an operation only where nothing else ran it. Where they are more, those of
    `CHOSEN` on the first instruction set and one of them on every other; the first ones of a file without these."""
    timed = [row for row in rows if "peers" in row and row["threads"] == min(r["threads"] for r in rows)]
    timed = [row for row in timed if row["operation"] != "completion_loss" or row["mode"] in MODES]
    timed = [row for row in timed if set(PEERS) & set(row["peers"])]
    fused = {row["operation"] for row in timed if row["implementation"] != "reference"}
    timed = [row for row in timed if row["implementation"] != "reference" or row["operation"] not in fused]
    if len(timed) <= MOST_ROWS:
        return timed
    chosen = [row for row in timed if _key(row) in CHOSEN and _series(row) == _series(timed[0])]
    chosen += [row for row in timed if _key(row) == ALSO_ELSEWHERE and _series(row) != _series(timed[0])]
    chosen.sort(key=lambda row: list(CHOSEN).index(_key(row)))
    return (chosen or timed)[:MOST_ROWS]


def plot_ratios(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a PNG with one panel per peer and one bar per row, from 1 (as fast) on a log axis: whiskers from the 10th
    to the 90th percentile over rounds, a dot at the ratio to the tuned peer, the ratio in a column of its own."""
    shown = shown_rows(rows)
    figure = Figure(figsize=(9, 1.7 + 0.29 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PEERS), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (peer, name) in zip(panels, PEERS.items(), strict=True):
        _panel(axes, shown, peer)
        axes.set_title(f"times faster than {name}", loc="left", color=INK, fontsize=9.5)
        axes.set_xlabel("log axis; 1: as fast", color=INK, fontsize=8.5)
    places = range(len(shown))
    panels[0].set_yticks(places, [_name(row, shown[0]) for row in shown], color=INK, fontsize=9)
    panels[0].set_ylim(len(shown) - 0.4, -0.6)
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    # What is a color first: handles come with lines before bars.
    order = sorted(named, key=lambda label: label not in {SERIES.get(_series(row), _series(row)) for row in shown})
    figure.legend(
        [named[label] for label in order], order, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _panel(axes: Axes, rows: Sequence[dict[str, Any]], peer: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for place, row in enumerate(rows):
        if peer in row["peers"]:
            _bar(axes, row, peer, place)
        if peer in (target := speed_bars(row)):
            reach = THICKNESS / 2 + 0.12
            label = "target of this project (AVX-512)"
            axes.vlines(target[peer], place - reach, place + reach, color=TARGET, linewidth=2, label=label, zorder=4)
    axes.axvline(1.0, color=INK, linewidth=0.8)
    axes.margins(x=0.06)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8.5, colors=INK)


def _bar(axes: Axes, row: dict[str, Any], peer: str, at: float) -> None:
    low, ratio, high = (row["peers"][peer][name] for name in ("ratio_p10", "ratio", "ratio_p90"))
    series = _series(row)
    axes.barh(at, ratio - 1, THICKNESS, left=1, color=COLORS.get(series, INK), label=SERIES.get(series, series))
    whisker = [[ratio - low], [high - ratio]]
    axes.errorbar(
        ratio, at, xerr=whisker, fmt="none", ecolor=INK, elinewidth=0.9, label="10th to 90th percentile of rounds"
    )
    if tuned := row["peers"].get(f"{peer}_tuned"):
        label = "ratio to that peer, tuned by hand"
        axes.plot(tuned["ratio"], at, "o", color="white", markeredgecolor=INK, markersize=4, zorder=5, label=label)
    # Beside the panel, where no bar, dot or line can be.
    beside = axes.get_yaxis_transform()
    axes.text(1.09, at, f"{ratio:.1f}", transform=beside, ha="right", va="center", color=INK, fontsize=9)


def _name(row: dict[str, Any], first: dict[str, Any]) -> str:
    name = CHOSEN.get(_key(row)) or _full_name(row)
    return name if _series(row) == _series(first) else f"{name}, {SERIES.get(_series(row), _series(row))}"


def _full_name(row: dict[str, Any]) -> str:
    inplace = ", in place" if row["mode"].endswith("inplace") else ""
    filters = f", {row['mode']}" if row["operation"] == "contrastive_sample" else ""
    return f"{row['operation']} {row['case']}{inplace}{filters}"


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["operation"], row["case"], row["mode"]


def _series(row: dict[str, Any]) -> str:
    return row["isa"] if row["implementation"] == "cpu" else row["implementation"]

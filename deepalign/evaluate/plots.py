"""The two plots every report shows, readable at the width of a README, in black and white, and by colour-blind readers.

Each curve has a colour (Okabe and Ito's palette), a line style and a marker of its own, and is named at its end, in
its own colour, rather than in a legend. Figures are built without pyplot: no global state and no display.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from deepalign.evaluate.statistics import wilson_interval

DPI = 200
INK = "#333333"
FAINT = "#dddddd"
LABEL_GAP = 0.062  # least distance of two curve names, as a share of the axis height
MAX_OFFSET = 0.055  # how far curves are moved aside, in units of one depth step, so that equal rates stay visible


@dataclass(frozen=True)
class CurveStyle:
    """How one curve is drawn; `label` is what the reader sees."""

    label: str
    color: str
    marker: str
    dashes: tuple[float, ...]


# Okabe and Ito (2008), their orange darkened so that its name reads on white.
_PALETTE = ("#7a7a7a", "#D55E00", "#CC8400", "#0072B2", "#CC79A7", "#009E73", "#000000", "#56B4E9")
_MARKERS = ("s", "o", "^", "D", "v", "P", "X", "<")
_DASHES: tuple[tuple[float, ...], ...] = ((1, 1.2), (), (6, 2), (), (4, 1.5, 1, 1.5), (2.5, 1.5), (8, 2), (1, 2.5))


def curve_styles(labels: Mapping[str, str]) -> dict[str, CurveStyle]:
    """A style for each named curve, in the order of `labels` (name -> what the reader sees).

    Raises:
        ValueError: there are more curves than styles that can be told apart.
    """
    if len(labels) > len(_PALETTE):
        raise ValueError(f"{len(labels)} curves cannot be told apart; plot at most {len(_PALETTE)}")
    parts = zip(labels.items(), _PALETTE, _MARKERS, _DASHES, strict=False)
    return {name: CurveStyle(label, color, marker, dashes) for (name, label), color, marker, dashes in parts}


def plot_attack_success(
    path: str | os.PathLike[str],
    counts: Mapping[str, Mapping[Any, tuple[int, int]]],
    styles: Mapping[str, CurveStyle],
    *,
    title: str,
    ylabel: str = "harmful answers",
) -> None:
    """Attack success rate by prefill depth with 95% Wilson bands, one curve per model, as a PNG.

    Depths stand at equal distances, because 0 and 1 would fall together on a linear axis.

    Args:
        path: the PNG to write.
        counts: model -> depth, a number or a word such as "all" -> (harmful answers k, attacks n). Numbers come first,
            in order.
        styles: at least one for each model.
        title: heading of the plot.
        ylabel: what the rates are of.
    """
    found = dict.fromkeys(depth for by_depth in counts.values() for depth in by_depth)
    depths = [*sorted(d for d in found if not isinstance(d, str)), *(d for d in found if isinstance(d, str))]
    figure, axes = _new_figure(title)
    ends = {}
    for index, (model, by_depth) in enumerate(counts.items()):
        style = styles[model]
        offset = MAX_OFFSET * (index - (len(counts) - 1) / 2)
        shown = [depth for depth in depths if by_depth.get(depth, (0, 0))[1] > 0]
        places = [depths.index(depth) + offset for depth in shown]
        rates = [by_depth[depth][0] / by_depth[depth][1] for depth in shown]
        intervals = [wilson_interval(*by_depth[depth]) for depth in shown]
        low, high = [interval[0] for interval in intervals], [interval[1] for interval in intervals]
        _draw_curve(axes, style, places, rates, low, high)
        ends[model] = rates[-1] if rates else math.nan
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set_xlim(-0.35, len(depths) - 0.65)
    axes.set_ylim(-0.03, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("tokens of a harmful answer forced (0: no attack)")
    axes.set_ylabel(ylabel)
    _label_ends(axes, ends, styles)
    save_atomic(figure, path)


def plot_position_profile(
    path: str | os.PathLike[str],
    profiles: Mapping[str, Mapping[str, Sequence[float | None]]],
    styles: Mapping[str, CurveStyle],
    *,
    title: str,
    ylabel: str = "KL to the base model (nats)",
) -> None:
    """A statistic by answer position with a band of 1.96 standard errors, on a log scale, as a PNG.

    The log scale shows the shallow tail: KL falls from several nats to hundredths within a few tokens.

    Args:
        path: the PNG to write.
        profiles: model -> dict with position, mean and standard_error (None: no band there).
        styles: at least one for each model.
        title: heading of the plot.
        ylabel: name and unit of the statistic.
    """
    figure, axes = _new_figure(title)
    positive = [float(m) for profile in profiles.values() for m in profile["mean"] if m is not None and m > 0]
    floor = min(positive, default=1e-3) / 2
    ends = {}
    for model, profile in profiles.items():
        means = [max(float(m or 0.0), floor) for m in profile["mean"]]
        margins = [1.96 * float(e or 0.0) for e in profile["standard_error"]]
        low = [max(m - margin, floor) for m, margin in zip(means, margins, strict=True)]
        high = [m + margin for m, margin in zip(means, margins, strict=True)]
        positions = [float(p) for p in profile["position"] if p is not None]
        _draw_curve(axes, styles[model], positions, means, low, high)
        ends[model] = means[-1]
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", which="minor", length=2, color=FAINT)
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("position in the answer (1: its first token)")
    axes.set_ylabel(ylabel)
    axes.margins(x=0.02)
    _label_ends(axes, ends, styles)
    save_atomic(figure, path)


def _new_figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6, 4.2), dpi=DPI)
    FigureCanvasAgg(figure)
    # The right margin holds the names of the curves.
    figure.subplots_adjust(left=0.095, right=0.8, top=0.9, bottom=0.13)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9, length=3, color="#999999")
    axes.xaxis.label.set(color=INK, fontsize=9.5)
    axes.yaxis.label.set(color=INK, fontsize=9.5)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _draw_curve(
    axes: Axes,
    style: CurveStyle,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
) -> None:
    # About 12 markers tell curves apart; one on every point of a long profile would hide its line.
    every = max(1, math.ceil(len(x) / 12))
    axes.fill_between(x, low, high, color=style.color, alpha=0.13, linewidth=0)
    axes.plot(
        x,
        y,
        color=style.color,
        marker=style.marker,
        markevery=every,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.4,
        linewidth=1.7,
        dashes=style.dashes if style.dashes else (None, None),
        clip_on=False,
    )


def _label_ends(axes: Axes, ends: Mapping[str, float], styles: Mapping[str, CurveStyle]) -> None:
    """Name each curve beside its end, moving names apart where curves end together, with a line to the right height."""
    shown = {model: value for model, value in ends.items() if math.isfinite(value)}
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    right = axes.get_xlim()[1]
    heights = {model: float(to_axes((right, value))[1]) for model, value in shown.items()}
    for model, height in spread_apart(heights, LABEL_GAP).items():
        style = styles[model]
        # All lines start at the frame: from the curves' own ends, which are dodged, they would cross.
        axes.plot(
            [1.0, 1.045],
            [heights[model], height],
            color=style.color,
            linewidth=0.8,
            marker=style.marker,
            markevery=[1],
            markersize=5.5,
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.text(
            1.065,
            height,
            style.label,
            transform=axes.transAxes,
            va="center",
            color=style.color,
            fontsize=9.5,
            fontweight="bold",
        )


def spread_apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Move heights in [0, 1] apart so that neighbours are at least `gap` from each other.

    The order is kept; of equal heights the first named comes out on top. Names that would overlap form a block around
    the mean of the heights they want, moved inside [0, 1] where it fits; blocks that then touch merge.
    """
    names = list(heights)
    order = sorted(names, key=lambda name: (heights[name], -names.index(name)))
    blocks: list[list[str]] = []
    for name in order:
        blocks.append([name])
        while len(blocks) > 1 and _bottom(blocks[-1], heights, gap) < _top(blocks[-2], heights, gap) + gap:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return {name: _bottom(block, heights, gap) + gap * index for block in blocks for index, name in enumerate(block)}


def _bottom(block: list[str], heights: Mapping[str, float], gap: float) -> float:
    height = gap * (len(block) - 1)
    centered = math.fsum(heights[name] for name in block) / len(block) - height / 2
    return max(0.0, min(centered, 1.0 - height))


def _top(block: list[str], heights: Mapping[str, float], gap: float) -> float:
    return _bottom(block, heights, gap) + gap * (len(block) - 1)


def save_atomic(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=DPI, facecolor="white")
    os.replace(temporary, path)

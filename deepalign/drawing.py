"""How the project draws: readable at the width of a README, in black and white, and by colour-blind readers.

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
from matplotlib.ticker import LogFormatter

DPI = 200
INK = "#333333"
FAINT = "#dddddd"
LABEL_GAP = 0.062  # least distance of two curve names, as a share of the axis height


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


def new_figure(title: str) -> tuple[Figure, Axes]:
    """A figure of one panel with room on the right for the names of its curves."""
    figure = Figure(figsize=(7.6, 4.2), dpi=DPI)
    FigureCanvasAgg(figure)
    # The right margin holds the names of the curves.
    figure.subplots_adjust(left=0.095, right=0.8, top=0.9, bottom=0.13)
    axes = figure.add_subplot()
    dress(axes, title)
    return figure, axes


def dress(axes: Axes, title: str) -> None:
    """Title, light spines and a horizontal grid."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9, length=3, color="#999999")
    axes.xaxis.label.set(color=INK, fontsize=9.5)
    axes.yaxis.label.set(color=INK, fontsize=9.5)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


class PlainLogFormatter(LogFormatter):
    """Numbers as they are written, at the ticks that matplotlib labels: between powers of ten on short axes only."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a tick, or nothing."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def log_y(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers and small ticks between powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PlainLogFormatter())
    axes.yaxis.set_minor_formatter(PlainLogFormatter())
    axes.tick_params(axis="y", which="minor", length=2, color=FAINT, labelcolor=INK, labelsize=9)


def draw_curve(
    axes: Axes,
    style: CurveStyle,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    *,
    hollow: bool = False,
) -> None:
    """A curve in its style, with the band from `low` to `high`; `hollow` markers are white inside."""
    # About 12 markers tell curves apart; one on every point of a long profile would hide its line.
    every = max(1, math.ceil(len(x) / 12))
    axes.fill_between(x, low, high, color=style.color, alpha=0.13, linewidth=0)
    axes.plot(x, y, markevery=every, clip_on=False, **line_options(style, hollow))


def line_options(style: CurveStyle, hollow: bool) -> dict[str, Any]:
    """A style as matplotlib's options of a line; `hollow` markers are white inside."""
    return {
        "color": style.color,
        "marker": style.marker,
        "markersize": 5.5,
        "markerfacecolor": "white" if hollow else style.color,
        "markeredgecolor": style.color if hollow else "white",
        "markeredgewidth": 1.0 if hollow else 0.4,
        "linewidth": 1.7,
        "dashes": style.dashes if style.dashes else (None, None),
    }


def label_ends(axes: Axes, ends: Mapping[str, float], styles: Mapping[str, CurveStyle]) -> None:
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


def save_atomic(figure: Figure, path: str | os.PathLike[str], dpi: int = DPI) -> None:
    """Write a PNG, whole or not at all; its folder is created where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=dpi, facecolor="white")
    os.replace(temporary, path)

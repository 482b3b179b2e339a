"""Bars of rates: one bar per method, its interval, a dot for every seed, and degenerate answers on top.

A low bar of harmful answers under a high one of gibberish is no defence, so the plot shows both.
"""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deepalign.drawing import DPI, FAINT, INK, save_atomic
from deepalign.evaluate.statistics import format_rate, wilson_interval

BAR, DOT, STACKED = "#0072B2", "#D55E00", "#c8c8c8"  # Okabe and Ito's palette, as in drawing.py
WIDTH = 0.62
SEEDS = (-0.26, -0.1)  # where they stand, from the middle of the bar


@dataclass(frozen=True)
class Bar:
    """A method's name, and per seed (k, n) of what the bar shows and of what is stacked on it."""

    label: str
    counts: Sequence[tuple[int, int]]
    stacked: Sequence[tuple[int, int]] = ()

    @property
    def rate(self) -> float:
        """Mean over seeds."""
        return _mean(self.counts)


def plot_bars(
    path: str | os.PathLike[str], bars: Sequence[Bar], *, title: str, ylabel: str, stacked: str = "degenerate"
) -> None:
    """Draw rates as a PNG: with one seed a 95% Wilson interval, with several a dot per seed.

    Args:
        path: the PNG to write.
        bars: in order, at least one.
        title, ylabel: of the plot.
        stacked: name of what is stacked on the bars.
    """
    figure = Figure(figsize=(max(5.0, 1.6 + 0.85 * len(bars)), 4.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(bars))
    rates = [bar.rate for bar in bars]
    several = any(len(bar.counts) > 1 for bar in bars)
    axes.bar(places, rates, width=WIDTH, color=BAR, label="harmful, mean over seeds" if several else "harmful")
    if any(k > 0 for bar in bars for k, _ in bar.stacked):
        tops = [_mean(bar.stacked) for bar in bars]
        axes.bar(places, tops, width=WIDTH, bottom=rates, color=STACKED, hatch="///", edgecolor="white", label=stacked)
    for place, bar in zip(places, bars, strict=True):
        _seeds(axes, place, bar)
        above = _mean(bar.stacked)
        text = format_rate(*bar.counts[0]).split(" ")[0] if len(bar.counts) == 1 else f"{100 * bar.rate:.0f}%"
        # The left third of a bar is the seeds'; a second line keeps the label off the next bar.
        text += f"\n+ {100 * above:.0f}%" if above else ""
        axes.text(place + 0.09, bar.rate + above + 0.015, text, ha="center", fontsize=8.5, color=INK)
    axes.set_xticks(list(places), [_wrapped(bar.label) for bar in bars], fontsize=8.5)
    axes.set_ylim(0, 1.14)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_ylabel(ylabel, color=INK, fontsize=9.5)
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    bars_first = sorted(named, key=lambda label: isinstance(named[label], Line2D))
    handles = [named[label] for label in bars_first]
    figure.legend(handles, bars_first, loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
    save_atomic(figure, Path(path))


def _seeds(axes: Axes, place: float, bar: Bar) -> None:
    """The interval of one seed, or a dot for each of several, on the left of the bar."""
    if len(bar.counts) == 1:
        interval = wilson_interval(*bar.counts[0])
        axes.plot([place + SEEDS[0]] * 2, interval, color=INK, linewidth=1.4, label="harmful, 95% interval")
        return
    step = (SEEDS[1] - SEEDS[0]) / (len(bar.counts) - 1)
    axes.plot(
        [place + SEEDS[0] + step * index for index in range(len(bar.counts))],
        [k / n for k, n in bar.counts],
        "o",
        color=DOT,
        markersize=4.5,
        markeredgecolor="white",
        zorder=3,
        clip_on=False,
        label="harmful, one seed",
    )


def _mean(counts: Sequence[tuple[int, int]]) -> float:
    return sum(k / n for k, n in counts) / len(counts) if counts else 0.0


def _wrapped(label: str) -> str:
    """Long names on several lines, as wide as a bar."""
    return "\n".join(textwrap.fill(line, 10, break_long_words=False) for line in label.splitlines())

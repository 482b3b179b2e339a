"""Bars of rates: one bar per method, its interval, a dot for every seed, and degenerate answers on top.

A low bar of harmful answers under a high one of gibberish is no defence, so the plot shows both.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepalign.drawing import DPI, FAINT, INK, save_atomic
from deepalign.evaluate.statistics import format_rate, wilson_interval

BAR, DOT, STACKED = "#0072B2", "#D55E00", "#c8c8c8"  # Okabe and Ito's palette, as in drawing.py


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
    figure = Figure(figsize=(max(5.0, 1.6 + 0.85 * len(bars)), 4.2), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(bars))
    rates = [bar.rate for bar in bars]
    axes.bar(places, rates, width=0.62, color=BAR, label="harmful")
    if any(k > 0 for bar in bars for k, _ in bar.stacked):
        tops = [_mean(bar.stacked) for bar in bars]
        axes.bar(places, tops, width=0.62, bottom=rates, color=STACKED, hatch="///", edgecolor="white", label=stacked)
        axes.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0.0, -0.3), ncols=2)
    for place, bar in zip(places, bars, strict=True):
        if len(bar.counts) == 1:
            low, high = wilson_interval(*bar.counts[0])
            axes.plot([place, place], [low, high], color=INK, linewidth=1.4)
            text = format_rate(*bar.counts[0]).split(" ")[0]
        else:
            high = max(k / n for k, n in bar.counts)
            shifts = [0.12 * (index - (len(bar.counts) - 1) / 2) for index in range(len(bar.counts))]
            dots = [k / n for k, n in bar.counts]
            axes.plot(
                [place + s for s in shifts], dots, "o", color=DOT, markersize=4.5, markeredgecolor="white", zorder=3
            )
            text = f"{100 * bar.rate:.0f}%"
        if above := _mean(bar.stacked):
            text += f" + {100 * above:.0f}%"
        top = max(min(high, 1.0), bar.rate + above)
        axes.text(place, top + 0.025, text, ha="center", fontsize=8.5, color=INK)
    axes.set_xticks(list(places), [_wrapped(bar.label) for bar in bars], fontsize=8.5)
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_ylabel(ylabel, color=INK, fontsize=9.5)
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    figure.tight_layout()
    save_atomic(figure, Path(path))


def _mean(counts: Sequence[tuple[int, int]]) -> float:
    return sum(k / n for k, n in counts) / len(counts) if counts else 0.0


def _wrapped(label: str) -> str:
    """Long names on two lines."""
    return label.replace(", ", ",\n") if "," in label else label.replace(" ", "\n", 1) if len(label) > 9 else label

"""Bars of rates: one bar per method, its interval, and a dot for every seed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepalign.evaluate.plots import DPI, FAINT, INK, save_atomic
from deepalign.evaluate.statistics import format_rate, wilson_interval

BAR, DOT = "#0072B2", "#D55E00"  # Okabe and Ito's palette, as in plots.py


@dataclass(frozen=True)
class Bar:
    """A method's name and (k, n) of each seed."""

    label: str
    counts: Sequence[tuple[int, int]]

    @property
    def rate(self) -> float:
        """Mean over seeds."""
        return sum(k / n for k, n in self.counts) / len(self.counts)


def plot_bars(path: str | os.PathLike[str], bars: Sequence[Bar], *, title: str, ylabel: str) -> None:
    """Draw rates as a PNG: with one seed a 95% Wilson interval, with several a dot per seed.

    Args:
        path: the PNG to write.
        bars: in order, at least one.
        title, ylabel: of the plot.
    """
    figure = Figure(figsize=(max(5.0, 1.6 + 0.85 * len(bars)), 4.2), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(bars))
    axes.bar(places, [bar.rate for bar in bars], width=0.62, color=BAR, alpha=0.85)
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
        axes.text(place, min(max(high, bar.rate), 1.0) + 0.025, text, ha="center", fontsize=8.5, color=INK)
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


def _wrapped(label: str) -> str:
    """Long names on two lines."""
    return label.replace(", ", ",\n") if "," in label else label.replace(" ", "\n", 1) if len(label) > 9 else label

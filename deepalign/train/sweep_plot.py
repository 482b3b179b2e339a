"""The plot of a sweep: every cell a point, one row of panels per column of the table, one panel per swept key."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepalign.drawing import INK, save_atomic

DPI = 150
POINT, LINE = "#0072B2", "#D55E00"
MOST_ROWS = 6


def columns_to_plot(rows: Sequence[Mapping[str, Any]], sort: str, others: Sequence[str]) -> list[str]:
    """The columns that a plot shows, at most `MOST_ROWS`: `sort`, then those of `others` in which the cells differ."""
    differing = [name for name in others if len({row[name] for row in rows if _is_number(row.get(name))}) > 1]
    return list(dict.fromkeys([sort, *differing]))[:MOST_ROWS]


def plot_sweep(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    columns: Sequence[str],
    measured: Sequence[str] = (),
) -> None:
    """Write the plot as a PNG: points are cells, the line joins their means at each value of the key.

    Values stand at equal distances in the order of the grid (rates and strengths are often swept by factors).

    Args:
        path: the PNG to write.
        rows: the table's rows; those without a number in a column are left out of its panels.
        keys: swept keys, across.
        columns: columns, down, see `columns_to_plot`.
        measured: columns that an evaluation wrote; where all values lie in [0, 1] they are taken to be rates, and the
            axis shows all of it.
    """
    figure = Figure(figsize=(3.4 * len(keys) + 0.6, 2.4 * len(columns) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(columns), len(keys), squeeze=False, sharey="row")
    for down, column in enumerate(columns):
        for across, key in enumerate(keys):
            _panel(panels[down][across], rows, key, column)
            panels[down][across].set_xlabel(key if down == len(columns) - 1 else "")
        panels[down][0].set_ylabel(column)
        if column in measured and all(0 <= row[column] <= 1 for row in rows if _is_number(row.get(column))):
            panels[down][0].set_ylim(-0.05, 1.05)
    figure.suptitle("a point is a cell, the line joins the means over cells", fontsize=9, color=INK)
    save_atomic(figure, path, DPI)


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, column: str) -> None:
    values = sorted({row[key] for row in rows}, key=_order)
    shown = [row for row in rows if _is_number(row.get(column))]
    found = {value: [row[column] for row in shown if row[key] == value] for value in values}
    for place, numbers in enumerate(found.values()):
        axes.plot([place] * len(numbers), numbers, "o", color=POINT, alpha=0.6, markersize=5)
    means = [(place, sum(numbers) / len(numbers)) for place, numbers in enumerate(found.values()) if numbers]
    axes.plot([place for place, _ in means], [mean for _, mean in means], color=LINE, linewidth=1.2)
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.ticklabel_format(axis="y", useOffset=False)  # a tick says its value, also where a metric hardly moves
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _order(value: Any) -> tuple[bool, Any, str]:
    """Numbers by size, before words."""
    return (False, value, "") if _is_number(value) else (True, 0, str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

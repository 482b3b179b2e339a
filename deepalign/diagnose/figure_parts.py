"""What the figures of a diagnosis are made of: axes with a statistic by position, bars of classes, legends.

A model has a colour and a marker (`deepalign/drawing.py`); harmful contexts are solid lines with filled markers, benign
ones dashed with hollow markers. So curves can be told apart in print and without colour. Classes of tokens have a
colour and a hatch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from deepalign.diagnose.bootstrap import Band
from deepalign.diagnose.report import profile_band
from deepalign.diagnose.tokens import CLASSES
from deepalign.drawing import DPI, FAINT, INK, CurveStyle, curve_styles, draw_curve, dress, line_options, log_y

Report = Mapping[str, Any]
POSITION = "position in the response (1: its first token)"
TITLES = {
    "kl": "KL(aligned‖base), nats",
    "reverse_kl": "KL(base‖aligned), nats",
    "jsd": "Jensen-Shannon divergence, nats",
    "top_overlap": "overlap of the top {top_n}",
    "favored_count": "base-favored tokens, all {vocab_size}",
    "favored_in_top": "base-favored among aligned's top {top_n}",
    "favored_in_base_top": "base-favored among base's top {top_n}",
}
BENIGN_DASHES = (3.0, 1.6)
CLASS_COLORS = dict(
    zip(
        CLASSES,
        ("#000000", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#0072B2", "#009E73", "#999999", "#F0E442"),
        strict=True,
    )
)
CLASS_HATCHES = dict(zip(CLASSES, ("", "//", "\\\\", "xx", "", "..", "--", "||", "++"), strict=True))
LABEL_LENGTH = 18  # of a token's name


def series_styles(report: Report) -> dict[str, CurveStyle]:
    """A style per series; grey stays free for the base."""
    return curve_styles({"base": "base", **{name: name for name in report["series"]}})


def new_figure(
    rows: int, columns: int, size: tuple[float, float], widths: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of panels, `widths` being those of its columns."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": widths} if widths else None)
    return figure, list(grid.ravel())


def _groups(report: Report) -> list[str]:
    return list(next(iter(report["series"].values()))["groups"])


def draw_statistic(
    axes: Axes,
    report: Report,
    statistic: str,
    names: Sequence[str],
    *,
    log: bool,
    groups: Sequence[str] | None = None,
    model_dashes: bool = False,
) -> None:
    """A statistic of `names` by position with its bands; the forced positions on grey ground."""
    positions = report["settings"]["positions"]
    title = TITLES[statistic].format(top_n=positions["top_n"], vocab_size=positions["vocab_size"])
    bands = {
        (name, group): profile_band(report["series"][name]["groups"][group], statistic)
        for name in names
        for group in groups or _groups(report)
    }
    positive = [value for band in bands.values() for value in band.mean if value > 0]
    floor = min(positive, default=1e-3) / 2 if log else 0.0
    styles = series_styles(report)
    for (name, group), band in bands.items():
        draw_band(axes, _style(styles[name], group, model_dashes), band, floor, hollow=group == "benign")
    dress(axes, title)
    axes.set_xlabel(POSITION)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    if log:
        log_y(axes)
    axes.set_ylim(bottom=floor)
    if statistic == "top_overlap":
        axes.set_ylim(0.0, 1.02)
    forced = max(
        report["series"][name]["groups"][group]["forced"] for name in names for group in groups or ("harmful",)
    )
    if forced:
        axes.axvspan(0.5, forced + 0.5, color=FAINT, alpha=0.5, linewidth=0, zorder=0)
        axes.set_xlim(left=0.3)


def _style(style: CurveStyle, group: str, model_dashes: bool) -> CurveStyle:
    if model_dashes:
        return style
    return replace(style, dashes=BENIGN_DASHES if group == "benign" else ())


def draw_band(axes: Axes, style: CurveStyle, band: Band, floor: float, hollow: bool = False) -> None:
    """Means with a band around them, nothing below `floor`."""
    means = [max(mean, floor) for mean in band.mean]
    edges = [
        [max(mean if edge is None else edge, floor) for mean, edge in zip(means, values, strict=True)]
        for values in (band.low, band.high)
    ]
    draw_curve(axes, style, [float(t) for t in band.position], means, *edges, hollow=hollow)


def draw_counts(axes: Axes, report: Report) -> None:
    """How many contexts reach a position."""
    styles = series_styles(report)
    for name, series in report["series"].items():
        for group, found in series["groups"].items():
            band = profile_band(found, "kl")
            style = _style(styles[name], group, False)
            counts = [float(n) for n in band.n]
            draw_curve(axes, style, [float(t) for t in band.position], counts, counts, counts, hollow=group == "benign")
    dress(axes, "contexts that reach the position")
    axes.set_xlabel(POSITION)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.set_ylim(bottom=0)


def legend_handle(style: CurveStyle, hollow: bool = False) -> Line2D:
    """A line as a legend shows it."""
    return Line2D([], [], label=style.label, **line_options(style, hollow))


def draw_legend(
    figure: Figure,
    report: Report,
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    model_dashes: bool = False,
    sizes: bool = False,
) -> None:
    """What the curves are; with `sizes` also of how many contexts."""
    styles, handles = series_styles(report), []
    for name in names:
        for group in groups or _groups(report):
            label = name if groups else f"{name}, {group}"
            if sizes:
                label += f" ({_sizes(profile_band(report['series'][name]['groups'][group], 'kl'))})"
            style = replace(_style(styles[name], group, model_dashes), label=label)
            handles.append(legend_handle(style, hollow=group == "benign"))
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = 4 if longest < 26 else 3 if longest < 42 else 2
    columns = math.ceil(len(handles) / math.ceil(len(handles) / columns))  # columns equally long
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3.4
    )


def _sizes(band: Band) -> str:
    """Contexts at the first position, and at the last where they are fewer."""
    first, last = band.n[0], band.n[-1]
    return (
        f"n = {first}" if first == last else f"n = {first}, from position {band.position[band.n.index(last)]}: {last}"
    )


def draw_classes(axes: Axes, found: Mapping[str, float], vocabulary: Mapping[str, float]) -> None:
    """Shares of the classes among `found`, each in an outline of its share of the vocabulary."""
    shown = [kind for kind in CLASSES if found[kind] > 0 or vocabulary[kind] > 0]
    places = range(len(shown))
    for place, kind in zip(places, shown, strict=True):
        axes.barh(
            place,
            100 * found[kind],
            color=CLASS_COLORS[kind],
            hatch=CLASS_HATCHES[kind],
            edgecolor="white",
            linewidth=0.4,
            height=0.5,
        )
        axes.barh(place, 100 * vocabulary[kind], facecolor="none", edgecolor=INK, linewidth=1.0, height=0.78)
    axes.set_yticks(places, shown, fontsize=9)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    dress(axes, "classes (outline: vocabulary)")
    horizontal(axes, "share of all tokens found, %")


def horizontal(axes: Axes, label: str) -> None:
    """Dress the axes of horizontal bars."""
    axes.grid(False, axis="y")
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)


def token_label(readable: str) -> str:
    """A token as the figure's font can print it, cut to a length."""
    text = readable if len(readable) <= LABEL_LENGTH else readable[: LABEL_LENGTH - 1] + "…"
    known = get_font(findfont(FontProperties())).get_charmap()
    printable = "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in text)
    return printable.replace("$", r"\$")

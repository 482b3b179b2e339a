"""The paper's figures from a user's own models: Fig. 1, 2 and 3, every statistic, Influence and GradMag.

A model has a colour and a marker (`deepalign/drawing.py`); harmful contexts are solid lines with filled markers, benign
ones dashed with hollow markers. So curves can be told apart in print and without colour. Classes of tokens have a
colour and a hatch. Figures read the report (`report.py`), nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from deepalign.diagnose.bootstrap import Band
from deepalign.diagnose.report import profile_band
from deepalign.diagnose.tokens import CLASSES
from deepalign.drawing import (
    DPI,
    FAINT,
    INK,
    CurveStyle,
    curve_styles,
    draw_curve,
    dress,
    line_options,
    log_y,
    save_atomic,
)

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
_CLASS_COLORS = dict(
    zip(
        CLASSES,
        ("#000000", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#0072B2", "#009E73", "#999999", "#F0E442"),
        strict=True,
    )
)
_CLASS_HATCHES = dict(zip(CLASSES, ("", "//", "\\\\", "xx", "", "..", "--", "||", "++"), strict=True))
# Bars, and how long a name may be.
BARS, LABEL_LENGTH = 30, 18
KINDS_DRAWN = 7


@dataclass(frozen=True)
class FigureFile:
    """A figure on disk: which it is, where, and how it is to be read."""

    name: str
    path: Path
    title: str
    caption: str


def write_figures(report: Report, folder: Path) -> list[FigureFile]:
    """Draw all figures that the report has data for, as PNG in `folder`; returns them in the order of the page."""
    first = next(iter(report["series"]))
    drawn = [_position_figure(report, folder), _token_figure(report, folder, first)]
    if "contrastive" in report["series"]:
        drawn.append(_contrastive_figure(report, folder, first))
    drawn.append(_statistics_figure(report, folder))
    if any("gradients" in series for series in report["series"].values()):
        drawn.append(_gradient_figure(report, folder))
    if "influence" in report["series"][first]:
        drawn.append(_influence_figure(report, folder, first))
    return drawn


def series_styles(report: Report) -> dict[str, CurveStyle]:
    """A style per series; grey stays free for the base."""
    return curve_styles({"base": "base", **{name: name for name in report["series"]}})


# ---- figures


def _position_figure(report: Report, folder: Path) -> FigureFile:
    figure, (left, right) = _panels(1, 2, (9.6, 4.3))
    plain = [name for name, series in report["series"].items() if series["contrast"] is None]
    _draw_statistic(left, report, "kl", plain, log=True)
    _draw_statistic(right, report, "favored_in_top", plain, log=False)
    _legend(figure, report, plain, sizes=True)
    return _saved(
        figure,
        folder / "fig1_positions.png",
        "Where alignment acts (Fig. 1)",
        "Left: how far each model is from its base, on a log scale. A curve that starts high and falls within a few "
        "positions is shallow alignment: later tokens are predicted as the base would. Right: tokens that the base "
        "favors among the aligned model's own top. Bands: bootstrap over contexts. Grey ground: forced prefixes.",
    )


def _contrastive_figure(report: Report, folder: Path, first: str) -> FigureFile:
    figure, (axes,) = _panels(1, 1, (9.6, 4.3))
    names = list(report["series"])
    _draw_statistic(axes, report, "kl", names, log=True, groups=("harmful",), model_dashes=True)
    _legend(figure, report, names, groups=("harmful",), model_dashes=True, sizes=True)
    alpha, space = report["series"]["contrastive"]["contrast"]
    return _saved(
        figure,
        folder / "fig3_contrastive.png",
        "With and without contrastive decoding (Fig. 3)",
        f"KL to the base in harmful contexts. Contrastive: {first}'s logits after Eq. 7, alpha {alpha:g} ({space}). In "
        "the paper it stays high at every position.",
    )


def _statistics_figure(report: Report, folder: Path) -> FigureFile:
    figure, panels = _panels(4, 2, (9.6, 11.0))
    names = list(report["series"])
    for axes, statistic in zip(panels, TITLES, strict=False):
        _draw_statistic(axes, report, statistic, names, log=statistic in ("kl", "reverse_kl"))
    _draw_counts(panels[-1], report)
    _legend(figure, report, names)
    return _saved(
        figure,
        folder / "statistics.png",
        "Every statistic by position",
        "Means over contexts with bootstrap bands. KL and reverse KL on log scales. Last panel: how many contexts "
        "reach a position; where few do, means are about other contexts than before.",
    )


def _token_figure(report: Report, folder: Path, first: str) -> FigureFile:
    everything = report["series"][first]["groups"]["harmful"]["tokens"][-1]
    tokens = everything["tokens"][:BARS]
    figure, (left, right) = _panels(1, 2, (9.6, 0.19 * max(len(tokens), 12) + 1.6), widths=(1.5, 1))
    labels = [_label(token["readable"]) for token in tokens]
    shares = [100 * token["share"] for token in tokens]
    colors = [_CLASS_COLORS[token["class"]] for token in tokens]
    hatches = [_CLASS_HATCHES[token["class"]] for token in tokens]
    bars = left.barh(range(len(tokens)), shares, color=colors, edgecolor="white", linewidth=0.4, height=0.8)
    for bar, hatch in zip(bars, hatches, strict=True):
        bar.set_hatch(hatch)
    left.set_yticks(range(len(tokens)), labels, fontsize=8.5)
    left.set_ylim(len(tokens) - 0.4, -0.6)
    dress(left, f"most frequent base-favored tokens, {first}")
    _horizontal(left, "rows whose most base-favored tokens include it, %")
    _draw_classes(right, everything["classes"], report["vocabulary_classes"])
    shown = [kind for kind in CLASSES if any(token["class"] == kind for token in tokens)]
    patches = [Patch(facecolor=_CLASS_COLORS[k], hatch=_CLASS_HATCHES[k], edgecolor="white", label=k) for k in shown]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(5, len(shown)), frameon=False, fontsize=9)
    top_k = report["settings"]["positions"]["top_k"]
    return _saved(
        figure,
        folder / "fig2_tokens.png",
        "Base-favored tokens (Fig. 2)",
        f"Left: tokens most often among the {top_k} that the base raises most over the aligned model (Algorithm 1), "
        "harmful contexts, all positions; ␣ is a space, ⏎ a line end. Right: classes among all those tokens beside the "
        "classes of the whole vocabulary. A class stands out where its filled bar is longer than its outline.",
    )


def _gradient_figure(report: Report, folder: Path) -> FigureFile:
    figure, (left, right) = _panels(1, 2, (9.6, 4.3))
    with_gradients = {name: series for name, series in report["series"].items() if "gradients" in series}
    styles = series_styles(report)
    for name, series in with_gradients.items():
        _draw_band(left, replace(styles[name], dashes=()), Band(**series["gradients"]["total"]), floor=0.0)
    dress(left, "GradMag over all parameters")
    first, series = next(iter(with_gradients.items()))
    kinds = series["gradients"]["kinds"]
    order = sorted(kinds, key=lambda kind: -float(np.mean(kinds[kind]["mean"])))[:KINDS_DRAWN]
    kind_styles = curve_styles({kind: kind for kind in order})
    for kind in order:
        means = Band(**kinds[kind])
        _draw_band(right, kind_styles[kind], replace(means, low=list(means.mean), high=list(means.mean)), floor=0.0)
    dress(right, f"by kind of module, {first}")
    for axes in (left, right):
        axes.set_xlabel(POSITION)
        axes.margins(x=0.02)
        axes.set_ylim(bottom=0)
    right.legend(
        handles=[_handle(kind_styles[kind]) for kind in order], fontsize=7.5, frameon=False, handlelength=3.2, ncols=2
    )
    left.legend(
        handles=[_handle(replace(styles[name], dashes=())) for name in with_gradients],
        fontsize=9,
        frameon=False,
        handlelength=3.2,
    )
    count, correlation = series["gradients"]["n"], series["gradients"]["surprise_correlation"]["value"]
    follows = "" if correlation is None else f" Rank correlation with -log P within a response: {correlation:.2f}."
    return _saved(
        figure,
        folder / "gradients.png",
        "GradMag (Eq. 2)",
        f"Norm of the gradient of log P(token t) over all parameters, and per kind of module, mean over {count} "
        f"harmful responses with bootstrap bands. The paper states that it declines with position.{follows}",
    )


def _influence_figure(report: Report, folder: Path, first: str) -> FigureFile:
    found = report["series"][first]["influence"]
    figure, (left, right) = _panels(1, 2, (9.6, 4.6), widths=(1.35, 1))
    answer = np.array([[np.nan if value is None else value for value in row] for row in found["answer"]])
    answer[answer <= 0] = np.nan
    length = max(found["error"]["position"])
    answer = answer[:length, :length]
    dress(left, f"Influence(i → t), {first}")
    left.grid(False)
    left.set_anchor("W")
    if np.isfinite(answer).any():
        high = float(np.nanmax(answer))
        norm = LogNorm(max(float(np.nanmin(answer)), high / 1e4), high)
        image = left.imshow(
            answer, cmap="cividis", norm=norm, origin="upper", extent=(0.5, length + 0.5, length + 0.5, 0.5)
        )
        bar = figure.colorbar(image, ax=left, shrink=0.85)
        bar.ax.set_title(r"$\Vert\partial\,\log P(y_t)\,/\,\partial h_i\Vert$", fontsize=9, color=INK, pad=8)
        bar.ax.tick_params(labelsize=9, colors=INK)
    left.set_xlabel("position i")
    left.set_ylabel("token t")
    style = replace(series_styles(report)[first], dashes=())
    _draw_band(right, style, Band(**found["error"]), floor=0.0)
    dress(right, r"Error(t) = $\sum_{i<t}$ KL$_i$ · Influence(i → t)")
    right.set_xlabel("token t")
    right.margins(x=0.02)
    right.set_ylim(bottom=0)
    layer = "the embedding output" if found["layer"] == 0 else f"the output of layer {found['layer']}"
    return _saved(
        figure,
        folder / "influence.png",
        "Influence and cumulative error (Eq. 3 and 4)",
        f"Left: how much the log-probability of token t depends on the hidden state of response position i ({layer}), "
        f"mean over {found['n']} harmful responses, log scale; only i < t can be non-zero. Right: cumulative error.",
    )


# ---- parts


def _panels(
    rows: int, columns: int, size: tuple[float, float], widths: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": widths} if widths else None)
    return figure, list(grid.ravel())


def _saved(figure: Figure, path: Path, title: str, caption: str) -> FigureFile:
    save_atomic(figure, path)
    return FigureFile(path.stem, path, title, caption)


def _groups(report: Report) -> list[str]:
    return list(next(iter(report["series"].values()))["groups"])


def _draw_statistic(
    axes: Axes,
    report: Report,
    statistic: str,
    names: Sequence[str],
    *,
    log: bool,
    groups: Sequence[str] | None = None,
    model_dashes: bool = False,
) -> None:
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
        _draw_band(axes, _style(styles[name], group, model_dashes), band, floor, hollow=group == "benign")
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


def _draw_band(axes: Axes, style: CurveStyle, band: Band, floor: float, hollow: bool = False) -> None:
    means = [max(mean, floor) for mean in band.mean]
    edges = [
        [max(mean if edge is None else edge, floor) for mean, edge in zip(means, values, strict=True)]
        for values in (band.low, band.high)
    ]
    draw_curve(axes, style, [float(t) for t in band.position], means, *edges, hollow=hollow)


def _draw_counts(axes: Axes, report: Report) -> None:
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


def _handle(style: CurveStyle, hollow: bool = False) -> Line2D:
    return Line2D([], [], label=style.label, **line_options(style, hollow))


def _legend(
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
            handles.append(_handle(style, hollow=group == "benign"))
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


def _draw_classes(axes: Axes, found: Mapping[str, float], vocabulary: Mapping[str, float]) -> None:
    shown = [kind for kind in CLASSES if found[kind] > 0 or vocabulary[kind] > 0]
    places = range(len(shown))
    for place, kind in zip(places, shown, strict=True):
        axes.barh(
            place,
            100 * found[kind],
            color=_CLASS_COLORS[kind],
            hatch=_CLASS_HATCHES[kind],
            edgecolor="white",
            linewidth=0.4,
            height=0.5,
        )
        axes.barh(place, 100 * vocabulary[kind], facecolor="none", edgecolor=INK, linewidth=1.0, height=0.78)
    axes.set_yticks(places, shown, fontsize=9)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    dress(axes, "classes (outline: vocabulary)")
    _horizontal(axes, "share of all tokens found, %")


def _horizontal(axes: Axes, label: str) -> None:
    axes.grid(False, axis="y")
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)


def _label(readable: str) -> str:
    """A token as the figure's font can print it, cut to a length."""
    text = readable if len(readable) <= LABEL_LENGTH else readable[: LABEL_LENGTH - 1] + "…"
    known = get_font(findfont(FontProperties())).get_charmap()
    printable = "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in text)
    return printable.replace("$", r"\$")

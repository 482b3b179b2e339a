"""The paper's figures from a user's own models: Fig. 1, 2 and 3, every statistic, Influence and GradMag.

Figures read the report (`report.py`), nothing else; `figure_parts.py` has what they are made of.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from deepalign.diagnose.bootstrap import Band
from deepalign.diagnose.figure_parts import (
    CLASS_COLORS,
    CLASS_HATCHES,
    POSITION,
    TITLES,
    Report,
    draw_band,
    draw_classes,
    draw_counts,
    draw_legend,
    draw_statistic,
    horizontal,
    legend_handle,
    new_figure,
    series_styles,
    token_label,
)
from deepalign.diagnose.tokens import CLASSES
from deepalign.drawing import INK, curve_styles, dress, save_atomic

BARS, KINDS_DRAWN = 30, 7  # how many tokens, and kinds of modules


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


# ---- figures


def _position_figure(report: Report, folder: Path) -> FigureFile:
    figure, (left, right) = new_figure(1, 2, (9.6, 4.3))
    plain = [name for name, series in report["series"].items() if series["contrast"] is None]
    draw_statistic(left, report, "kl", plain, log=True)
    draw_statistic(right, report, "favored_in_top", plain, log=False)
    draw_legend(figure, report, plain, sizes=True)
    return _saved(
        figure,
        folder / "fig1_positions.png",
        "Where alignment acts (Fig. 1)",
        "Left: how far each model is from its base, on a log scale. A curve that starts high and falls within a few "
        "positions is shallow alignment: later tokens are predicted as the base would. Right: tokens that the base "
        "favors among the aligned model's own top. Bands: bootstrap over contexts. Grey ground: forced prefixes.",
    )


def _contrastive_figure(report: Report, folder: Path, first: str) -> FigureFile:
    figure, (axes,) = new_figure(1, 1, (9.6, 4.3))
    names = list(report["series"])
    draw_statistic(axes, report, "kl", names, log=True, groups=("harmful",), model_dashes=True)
    draw_legend(figure, report, names, groups=("harmful",), model_dashes=True, sizes=True)
    alpha, space = report["series"]["contrastive"]["contrast"]
    return _saved(
        figure,
        folder / "fig3_contrastive.png",
        "With and without contrastive decoding (Fig. 3)",
        f"KL to the base in harmful contexts. Contrastive: {first}'s logits after Eq. 7, alpha {alpha:g} ({space}). In "
        "the paper it stays high at every position.",
    )


def _statistics_figure(report: Report, folder: Path) -> FigureFile:
    figure, panels = new_figure(4, 2, (9.6, 11.0))
    names = list(report["series"])
    for axes, statistic in zip(panels, TITLES, strict=False):
        draw_statistic(axes, report, statistic, names, log=statistic in ("kl", "reverse_kl"))
    draw_counts(panels[-1], report)
    draw_legend(figure, report, names)
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
    figure, (left, right) = new_figure(1, 2, (9.6, 0.19 * max(len(tokens), 12) + 1.6), widths=(1.5, 1))
    labels = [token_label(token["readable"]) for token in tokens]
    shares = [100 * token["share"] for token in tokens]
    colors = [CLASS_COLORS[token["class"]] for token in tokens]
    hatches = [CLASS_HATCHES[token["class"]] for token in tokens]
    bars = left.barh(range(len(tokens)), shares, color=colors, edgecolor="white", linewidth=0.4, height=0.8)
    for bar, hatch in zip(bars, hatches, strict=True):
        bar.set_hatch(hatch)
    left.set_yticks(range(len(tokens)), labels, fontsize=8.5)
    left.set_ylim(len(tokens) - 0.4, -0.6)
    dress(left, f"most frequent base-favored tokens, {first}")
    horizontal(left, "rows whose most base-favored tokens include it, %")
    draw_classes(right, everything["classes"], report["vocabulary_classes"])
    shown = [kind for kind in CLASSES if any(token["class"] == kind for token in tokens)]
    patches = [Patch(facecolor=CLASS_COLORS[k], hatch=CLASS_HATCHES[k], edgecolor="white", label=k) for k in shown]
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
    figure, (left, right) = new_figure(1, 2, (9.6, 4.3))
    with_gradients = {name: series for name, series in report["series"].items() if "gradients" in series}
    styles = series_styles(report)
    for name, series in with_gradients.items():
        draw_band(left, replace(styles[name], dashes=()), Band(**series["gradients"]["total"]), floor=0.0)
    dress(left, "GradMag over all parameters")
    first, series = next(iter(with_gradients.items()))
    kinds = series["gradients"]["kinds"]
    order = sorted(kinds, key=lambda kind: -float(np.mean(kinds[kind]["mean"])))[:KINDS_DRAWN]
    kind_styles = curve_styles({kind: kind for kind in order})
    for kind in order:
        means = Band(**kinds[kind])
        draw_band(right, kind_styles[kind], replace(means, low=list(means.mean), high=list(means.mean)), floor=0.0)
    dress(right, f"by kind of module, {first}")
    for axes in (left, right):
        axes.set_xlabel(POSITION)
        axes.margins(x=0.02)
        axes.set_ylim(bottom=0)
    right.legend(
        handles=[legend_handle(kind_styles[kind]) for kind in order],
        fontsize=7.5,
        frameon=False,
        handlelength=3.2,
        ncols=2,
    )
    left.legend(
        handles=[legend_handle(replace(styles[name], dashes=())) for name in with_gradients],
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
    figure, (left, right) = new_figure(1, 2, (9.6, 4.6), widths=(1.35, 1))
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
    draw_band(right, style, Band(**found["error"]), floor=0.0)
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


def _saved(figure: Figure, path: Path, title: str, caption: str) -> FigureFile:
    save_atomic(figure, path)
    return FigureFile(path.stem, path, title, caption)

"""The two plots every report shows, drawn as `deepalign/drawing.py` has it."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from deepalign.drawing import CurveStyle, draw_curve, label_ends, log_y, new_figure, save_atomic
from deepalign.evaluate.statistics import wilson_interval

MAX_OFFSET = 0.055  # how far curves are moved aside, in units of one depth step, so that equal rates stay visible


def plot_attack_success(
    path: str | os.PathLike[str],
    counts: Mapping[str, Mapping[Any, tuple[int, int]]],
    styles: Mapping[str, CurveStyle],
    *,
    title: str,
    ylabel: str = "harmful answers",
) -> None:
    """Attack success rate by prefill depth with 95% Wilson bands, one curve per model, as a PNG.

    Depths stand at equal distances, because 0 and 1 would fall together on a linear axis; the axis says so.

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
    figure, axes = new_figure(title)
    ends = {}
    for index, (model, by_depth) in enumerate(counts.items()):
        style = styles[model]
        offset = MAX_OFFSET * (index - (len(counts) - 1) / 2)
        shown = [depth for depth in depths if by_depth.get(depth, (0, 0))[1] > 0]
        places = [depths.index(depth) + offset for depth in shown]
        rates = [by_depth[depth][0] / by_depth[depth][1] for depth in shown]
        intervals = [wilson_interval(*by_depth[depth]) for depth in shown]
        low, high = [interval[0] for interval in intervals], [interval[1] for interval in intervals]
        draw_curve(axes, style, places, rates, low, high)
        ends[model] = rates[-1] if rates else math.nan
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set_xlim(-0.35, len(depths) - 0.65)
    axes.set_ylim(-0.03, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("tokens of a harmful answer forced (0: no attack), not to scale")
    axes.set_ylabel(ylabel)
    label_ends(axes, ends, styles)
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
        profiles: model -> dict with position, mean, standard_error (None: no band there) and n, which the title gets.
        styles: at least one for each model.
        title: heading of the plot.
        ylabel: name and unit of the statistic.
    """
    sizes = sorted({n for profile in profiles.values() for n in profile["n"] if n is not None})
    shown_n = " to ".join(str(n) for n in dict.fromkeys((*sizes[:1], *sizes[-1:])))
    figure, axes = new_figure(f"{title} (n = {shown_n})" if sizes else title)
    positive = [float(m) for profile in profiles.values() for m in profile["mean"] if m is not None and m > 0]
    floor = min(positive, default=1e-3) / 2
    ends, cut = {}, False
    for model, profile in profiles.items():
        means = [max(float(m or 0.0), floor) for m in profile["mean"]]
        margins = [1.96 * float(e or 0.0) for e in profile["standard_error"]]
        low = [max(m - margin, floor) for m, margin in zip(means, margins, strict=True)]
        cut |= any(m - margin < floor <= m for m, margin in zip(means, margins, strict=True))
        high = [m + margin for m, margin in zip(means, margins, strict=True)]
        positions = [float(p) for p in profile["position"] if p is not None]
        draw_curve(axes, styles[model], positions, means, low, high)
        ends[model] = means[-1]
    log_y(axes)
    axes.set_ylim(bottom=floor)
    # Means of a few large values have bands that reach below what a log axis has.
    note = "; bands cut at the bottom reach 0 or nearly" if cut else ""
    axes.set_xlabel(f"position in the answer (1: its first token){note}")
    axes.set_ylabel(ylabel)
    axes.margins(x=0.02)
    label_ends(axes, ends, styles)
    save_atomic(figure, path)

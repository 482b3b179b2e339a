"""From records to a report: means with bands, a verdict in numbers, and where it disagrees with the paper.

`report.json` holds, beside settings and versions:

    {"series": {name: {"model": path, "contrast": null or [alpha, space],
                       "groups": {"harmful": {"n": contexts, "forced": most forced ids, "verdict": {...},
                                              "profiles": {statistic: {position, mean, low, high, n}},
                                              "tokens": [per position band: tokens, classes]},
                                  "benign": ...},
                       "gradients": {...}, "influence": {...}}},
     "vocabulary_classes": {class: share}, "claims": [{"claim", "paper", "measured", "verdict"}],
     "reading": [how to read it, in sentences]}

A claim's verdict is "agrees" or "disagrees" where the bootstrap band of the number it rests on excludes no effect, else
"undecided"; the share of formatting tokens (Fig. 2) has no band, and agrees above a half. A report that could only
agree would be no evidence.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepalign.diagnose.bootstrap import (
    Band,
    BootstrapOptions,
    Means,
    band,
    below_for_good,
    bootstrap_means,
    first_below,
    split,
    window_means,
)
from deepalign.diagnose.favored import BANDS, count_tokens, token_report
from deepalign.diagnose.records import read_records
from deepalign.diagnose.rows import STATISTICS
from deepalign.diagnose.tokens import FORMATTING, TokenNames

EARLY, LATE = (1, 3), (16, None)  # the paper's positions 0 to 2 and 15 and beyond, counted from 1
AFTER_FIRST = (2, 15)
Number = dict[str, float | None]


def summarise(path: Path, record: np.dtype, total: int, options: BootstrapOptions) -> Mapping[str, Means]:
    """Means of every statistic by position, over the records of a file and over resamples of them."""
    chunks = (
        np.stack([records[name] for name in STATISTICS], axis=1).reshape(len(records), -1)
        for records in read_records(path, record)
    )
    return split(bootstrap_means(chunks, total, options), STATISTICS)


def group_report(
    path: Path, record: np.dtype, total: int, options: BootstrapOptions, names: TokenNames
) -> tuple[dict[str, Any], Mapping[str, Means]]:
    """What one series shows on one group of contexts, ready for JSON, and the means that comparisons need."""
    means = summarise(path, record, total, options)
    counts, rows = count_tokens(read_records(path, record), BANDS, names.size)
    return {
        "n": total,
        "forced": max(int(records["forced"].max()) for records in read_records(path, record)),
        "profiles": {name: band(values, options).to_dict() for name, values in means.items()},
        "verdict": verdict(means, options),
        "tokens": token_report(counts, rows, BANDS, names),
    }, means


def verdict(means: Mapping[str, Means], options: BootstrapOptions) -> dict[str, Any]:
    """The numbers that say how deep the alignment is.

    Returns:
        `kl_first`: KL at position 1; `below_tenth`: the first position whose mean KL is below a tenth of that, and
        `below_tenth_for_good`: from which on it stays there, with bands over resamples (None: never); `kl_early`,
        `kl_late`, `favored_early`, `favored_late`: means over positions 1 to 3 and from 16 on, of KL and of the
        base-favored count in aligned's top n; their ratios late over early.
    """
    kl = means["kl"]
    found: dict[str, Any] = {"kl_first": _number(*_first(kl), options)}
    found["below_tenth"] = _position(first_below, kl, options)
    found["below_tenth_for_good"] = _position(below_for_good, kl, options)
    for prefix, statistic in (("kl", "kl"), ("favored", "favored_in_top")):
        for name, windows in (("early", (EARLY,)), ("late", (LATE,)), ("late_over_early", (LATE, EARLY))):
            found[f"{prefix}_{name}"] = _number(*_window(means[statistic], windows), options)
    return found


def claims(
    series: Mapping[str, Mapping[str, Mapping[str, Means]]],
    report: Mapping[str, Any],
    first: str,
    contrastive: str | None,
    options: BootstrapOptions,
) -> list[dict[str, Any]]:
    """What the paper says of an aligned model beside what was measured of series `first`.

    Args:
        series: name -> group -> statistic -> means.
        report: the report so far.
        first: the aligned model.
        contrastive: the series of contrastive decoding on it, if there is one.
        options: of the bootstrap.
    """
    harmful, benign = series[first]["harmful"], series[first].get("benign")
    found = [
        _declines(
            "KL to the base declines with position",
            "Fig. 1 and 3: about 1.8 nats early, 0.5 late",
            harmful["kl"],
            options,
        ),
        _declines(
            "the base-favored count among aligned's top tokens declines with position",
            "Fig. 1: 45 early, 35 late in harmful contexts",
            harmful["favored_in_top"],
            options,
        ),
        _declines(
            "the base-favored share of the whole vocabulary declines with position",
            "Eq. 6 read over the vocabulary; the paper's figures cannot be that",
            harmful["favored_count"],
            options,
        ),
    ]
    if benign is not None:
        for name, window in (("early", EARLY), ("late", LATE)):
            paper = "Fig. 1: 45 against 30" if window is EARLY else "Fig. 1: 35 against 25"
            (value, resampled), (baseline, baseline_resampled) = (
                _window(group["favored_in_top"], (window,)) for group in (harmful, benign)
            )
            number = _number(value - baseline, resampled - baseline_resampled, options)
            text = f"harmful contexts have more base-favored tokens than benign ones ({name} positions)"
            found.append(_claim(text, paper, number, "harmful minus benign", above=0.0))
    if contrastive is not None:
        other = series[contrastive]["harmful"]["kl"]
        kl = harmful["kl"]
        (value, resampled), (plain, plain_resampled) = (_window(means, (LATE,)) for means in (other, kl))
        number = _number(value / plain, resampled / plain_resampled, options)
        text = "contrastive decoding keeps KL above the aligned model's at late positions"
        found.append(_claim(text, "Fig. 3: 6.0 against 0.5 nats", number, "ratio", above=1.0))
    found.append(_formatting_claim(report, first))
    gradients = report["series"][first].get("gradients")
    if gradients is not None:
        text, paper = "GradMag declines with position", "stated of Eq. 2; no figure is given"
        surprise = gradients["surprise_correlation"]["value"]
        what = "late over early" + ("" if surprise is None else f" (rank correlation with -log P: {surprise:.2f})")
        found.append(_claim(text, paper, gradients["late_over_early"], what, below=1.0))
        text = "GradMag declines with position after the first token, which alignment makes surprising"
        found.append(_claim(text, paper, gradients["late_over_after_first"], "late over positions 2 to 15", below=1.0))
    return found


def gradient_report(path: Path, record: np.dtype, total: int, kind_names: list[str], options: BootstrapOptions) -> Any:
    """GradMag by position, over all parameters and per kind of module, late over early, and how it follows surprise.

    `surprise_correlation`: rank correlation of GradMag(t) and -log P(token t) within a response, mean over responses.
    """
    positions = record["total"].shape[0]
    chunks = (
        np.concatenate([records["total"], records["kind"].transpose(0, 2, 1).reshape(len(records), -1)], axis=1)
        for records in read_records(path, record)
    )
    correlations = (
        np.array([[rank_correlation(row["total"], -row["logprob"])] for row in records])
        for records in read_records(path, record)
    )
    names = ("total", *kind_names)
    by_name = split(bootstrap_means(chunks, total, options), names)
    total_means = by_name["total"]
    assert len(total_means.mean) == positions
    return {
        "n": total,
        "total": band(total_means, options).to_dict(),
        "kinds": {name: band(by_name[name], options).to_dict() for name in kind_names},
        "surprise_correlation": _number(*_first(bootstrap_means(correlations, total, options)), options),
        "late_over_early": _number(*_window(total_means, (LATE, EARLY)), options),
        "late_over_after_first": _number(*_window(total_means, (LATE, AFTER_FIRST)), options),
    }


def influence_report(path: Path, record: np.dtype, total: int, layer: int, options: BootstrapOptions) -> Any:
    """Mean Influence(i -> t), rows t and columns i, what the prompt has, and Error(t) with its band."""
    positions = record["error"].shape[0]
    chunks = (
        np.concatenate([records["error"], records["prompt"], records["answer"].reshape(len(records), -1)], axis=1)
        for records in read_records(path, record)
    )
    means = bootstrap_means(chunks, total, BootstrapOptions(1, options.confidence, options.seed))
    error_chunks = (records["error"] for records in read_records(path, record))
    error = bootstrap_means(error_chunks, total, options)
    answer = means.mean[2 * positions :].reshape(positions, positions)
    return {
        "n": total,
        "layer": layer,
        "answer": [[None if np.isnan(value) else float(value) for value in row] for row in answer],
        "prompt": [None if np.isnan(value) else float(value) for value in means.mean[positions : 2 * positions]],
        "error": band(error, options).to_dict(),
    }


def _window(means: Means, windows: tuple[tuple[int, int | None], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first window, divided by that over the second if there is one, of the means and of the resamples.

    (1,) and (B,), NaN where nothing is there.
    """

    def over(means_BT: np.ndarray) -> np.ndarray:
        first, *rest = (window_means(means_BT, *window) for window in windows)
        with np.errstate(invalid="ignore", divide="ignore"):
            return first / rest[0] if rest else first

    return over(means.mean[None]), over(_resampled(means))


def _resampled(means: Means) -> np.ndarray:
    """The resampled means; NaN of one context, which says nothing about spread."""
    return means.resampled if means.n.max() > 1 else np.full_like(means.resampled, np.nan)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation of two series with gaps (NaN, in both alike); NaN below three values, or of a constant.

    Equal values share a rank: log P of a token that is certain is exactly 0, at many positions of one response.
    """
    there = ~np.isnan(first)
    ranks, others = (_ranks(values[there]) for values in (first, second))
    if there.sum() < 3 or ranks.min() == ranks.max() or others.min() == others.max():
        return np.nan
    return float(np.corrcoef(ranks, others)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values have the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = counts.cumsum() - (counts - 1) / 2
    return ranks[place]


def _first(means: Means) -> tuple[np.ndarray, np.ndarray]:
    return means.mean[:1], _resampled(means)[:, 0]


def _number(value: np.ndarray, resampled: np.ndarray, options: BootstrapOptions) -> Number:
    """A measured number with its band; None where it does not exist."""
    known = resampled[np.isfinite(resampled)]
    low, high = np.quantile(known, options.quantiles) if known.size else (np.nan, np.nan)
    numbers = {"value": float(value.ravel()[0]), "low": float(low), "high": float(high)}
    return {name: number if np.isfinite(number) else None for name, number in numbers.items()}


def _position(rule: Callable[[np.ndarray], np.ndarray], kl: Means, options: BootstrapOptions) -> Number:
    """Where KL falls below a tenth by a rule; "never" sorts last and is None."""
    resampled = np.where(np.isnan(found := rule(_resampled(kl))), np.inf, found)
    value = rule(kl.mean[None])[0]
    edges = np.quantile(resampled, options.quantiles, method="inverted_cdf")
    numbers = {"value": value, "low": edges[0], "high": edges[1]}
    return {name: float(number) if np.isfinite(number) else None for name, number in numbers.items()}


def _declines(text: str, paper: str, means: Means, options: BootstrapOptions) -> dict[str, Any]:
    return _claim(text, paper, _number(*_window(means, (LATE, EARLY)), options), "late over early", below=1.0)


def _claim(
    text: str, paper: str, number: Number, what: str, *, below: float | None = None, above: float | None = None
) -> dict[str, Any]:
    """A claim that `number` is below or above a value, settled by its band."""
    low, high = number["low"], number["high"]
    found = "undecided"
    if number["value"] is None:
        found = "not measured"
    elif low is None or high is None:
        found = "undecided"
    elif below is not None and (high < below or low > below):
        found = "agrees" if high < below else "disagrees"
    elif above is not None and (low > above or high < above):
        found = "agrees" if low > above else "disagrees"
    return {"claim": text, "paper": paper, "measured": {"what": what, **number}, "verdict": found}


def _formatting_claim(report: Mapping[str, Any], first: str) -> dict[str, Any]:
    """Fig. 2: are the most frequent base-favored tokens predominantly formatting? The vocabulary's share beside it."""
    everything = report["series"][first]["groups"]["harmful"]["tokens"][-1]
    listed = sum(everything["classes_of_listed"][kind] for kind in FORMATTING)
    vocabulary = sum(report["vocabulary_classes"][kind] for kind in FORMATTING)
    measured = {"what": "share of the listed tokens", "value": listed, "low": None, "high": None}
    return {
        "claim": "the most frequent base-favored tokens are predominantly special tokens, whitespace and punctuation "
        f"(their share of the vocabulary: {vocabulary:.1%})",
        "paper": "Fig. 2, and the text",
        "measured": measured,
        "verdict": "agrees" if listed > 0.5 else "disagrees",
    }


def profile_band(group: Mapping[str, Any], statistic: str) -> Band:
    """A statistic's band out of a report."""
    return Band(**group["profiles"][statistic])

"""Means by position with bootstrap bands over contexts, in memory that does not grow with their number.

A resample of n contexts is a vector of n counts, multinomial(n; 1/n, ..., 1/n). It is drawn and used a chunk of
contexts at a time: how many of the draws that are left fall into the chunk is binomial, and how they spread inside it
is multinomial again, so the counts are exactly those of the whole. Every chunk adds counts times values to the sums of
all resamples, one matrix product for all of them and all statistics.

A context that ends before position t does not count there, in a resample either: its mean at t is over those drawn that
reach t. Bands are percentiles of the resamples' means.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

TENTH = 0.1


@dataclass(frozen=True)
class BootstrapOptions:
    """How many resamples, which share of them the bands hold, and the seed."""

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {self.resamples}")
        if not 0.0 < self.confidence < 1.0:
            raise ValueError(f"confidence must lie strictly between 0 and 1, got {self.confidence}")

    @property
    def quantiles(self) -> tuple[float, float]:
        """Of the two edges of a band."""
        return 0.5 - self.confidence / 2, 0.5 + self.confidence / 2


@dataclass(frozen=True)
class Band:
    """A statistic by position: mean, the band's edges (None where fewer than two contexts reach it), and how many do.

    `position` is 1-based; positions that no context reaches are left out.
    """

    position: list[int]
    mean: list[float]
    low: list[float | None]
    high: list[float | None]
    n: list[int]

    def to_dict(self) -> dict[str, list[Any]]:
        """The lists by name, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Means:
    """Means over contexts and over the same contexts resampled.

    Attributes:
        mean: (D,) float64, NaN where nothing was measured.
        resampled: (B, D) of each resample, NaN where it drew nothing.
        n: (D,) int64, contexts with a value.
    """

    mean: np.ndarray
    resampled: np.ndarray
    n: np.ndarray


def bootstrap_means(chunks: Iterable[np.ndarray], total: int, options: BootstrapOptions) -> Means:
    """Means and resampled means of D values per context.

    Args:
        chunks: (c, D) float64 each, NaN where a context has no value; `total` contexts together.
        total: n; equal n and seed give equal resamples for chunks of equal sizes, so models measured on the same
            contexts are resampled together.
        options: of the bootstrap.

    Raises:
        ValueError: no contexts, or not as many as `total` says.
    """
    if total < 1:
        raise ValueError(f"there is nothing to average: {total} contexts")
    generator = np.random.default_rng(options.seed)
    left, draws = total, np.full(options.resamples, total)
    sums: list[np.ndarray] = []
    for values in chunks:
        size = len(values)
        if size > left:
            raise ValueError(f"more contexts than the {total} that were announced")
        here = generator.binomial(draws, size / left)
        counts = generator.multinomial(here, np.full(size, 1.0 / size)).astype(np.float64)
        left, draws = left - size, draws - here
        there = ~np.isnan(values)
        known = np.where(there, values, 0.0)
        parts = [known.sum(0), there.sum(0), counts @ known, counts @ there]
        sums = parts if not sums else [total_ + part for total_, part in zip(sums, parts, strict=True)]
    if left:
        raise ValueError(f"{total} contexts were announced and {total - left} came")
    with np.errstate(invalid="ignore", divide="ignore"):
        return Means(sums[0] / sums[1], sums[2] / sums[3], sums[1].astype(np.int64))


def band(means: Means, options: BootstrapOptions) -> Band:
    """The band over positions; D is T here."""
    reached = np.flatnonzero(means.n > 0)
    low, high = np.nanquantile(means.resampled[:, reached], options.quantiles, axis=0)
    spread = means.n[reached] > 1  # one context says nothing about spread
    return Band(
        position=[int(t) + 1 for t in reached],
        mean=[float(value) for value in means.mean[reached]],
        low=[float(v) if known else None for v, known in zip(low, spread, strict=True)],
        high=[float(v) if known else None for v, known in zip(high, spread, strict=True)],
        n=[int(value) for value in means.n[reached]],
    )


def split(means: Means, names: tuple[str, ...]) -> Mapping[str, Means]:
    """Means of several statistics, D = names x T, as one per name."""
    parts = [np.split(values, len(names), axis=-1) for values in (means.mean, means.resampled, means.n)]
    return {name: Means(*arrays) for name, *arrays in zip(names, *parts, strict=True)}


def first_below(means_BT: np.ndarray, share: float = TENTH) -> np.ndarray:
    """The first 1-based position whose mean is below `share` of the first position's, (B,) float64, NaN for never."""
    with np.errstate(invalid="ignore"):
        below_BT = means_BT < share * means_BT[:, :1]
    return np.where(below_BT.any(-1), below_BT.argmax(-1) + 1.0, np.nan)


def below_for_good(means_BT: np.ndarray, share: float = TENTH) -> np.ndarray:
    """The first 1-based position from which on every mean is below `share` of the first's, (B,), NaN for never.

    Where some tokens are certain to both models, KL falls to nothing there and comes back; this is where it stays away.
    """
    with np.errstate(invalid="ignore"):
        reached_BT = means_BT >= share * means_BT[:, :1]
    last_B = means_BT.shape[1] - reached_BT[:, ::-1].argmax(-1)  # 1-based; position 1 always reaches itself
    # fewer and fewer contexts reach a position, so what is known is a beginning
    known_B = (~np.isnan(means_BT)).sum(-1)
    return np.where(reached_BT.any(-1) & (last_B < known_B), last_B + 1.0, np.nan)


def window_means(means_BT: np.ndarray, first: int, last: int | None) -> np.ndarray:
    """Mean over 1-based positions `first` to `last` (inclusive; None: to the end), (B,), NaN where nothing is there."""
    window = means_BT[:, first - 1 : last]
    known = ~np.isnan(window)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, window, 0.0).sum(-1) / known.sum(-1)

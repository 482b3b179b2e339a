"""Contrastive sampling once more, independently: one row at a time, sorted whole, NumPy in float64.

Rounding of x in the precision that an implementation computes in may fall either way where two entries are nearly equal
or where a threshold is nearly met. So a row has a few distributions, one for each way that these can fall, and the
token has to be drawn from one of them. Exact ties are no such case: they go to the lowest index.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepalign.kernels.contrastive_sample import IMPLEMENTATIONS, ContrastiveSample, contrastive_sample
from tests.kernels.oracle import difference_in_compute_dtype, present_entries, softmax_logs
from tests.kernels.samples import DTYPES, runnable_on_cpu, three_models

RUNNABLE = runnable_on_cpu(IMPLEMENTATIONS)
# compiled kernels take no float64
RUNNABLE_DTYPES = [
    (name, dtype) for name in RUNNABLE for dtype in DTYPES if name == "reference" or dtype != torch.float64
]

BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass
class Options:
    alpha: float
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    space: str = "logits"
    vocab_size: int | None = None


class Entries(NamedTuple):
    """Entries of a row, descending by x, ties by index."""

    index: np.ndarray
    x: np.ndarray
    place: np.ndarray  # among the row's present entries
    lowered: np.ndarray  # whether x is less than a

    def __getitem__(self, chosen: slice | np.ndarray) -> "Entries":
        return Entries(*(column[chosen] for column in tuple(self)))


class Row:
    """One row of (V,) logits.

    Attributes:
        bad: whether nothing can be drawn.
        slack: absolute error to allow in x: a few roundings of values as large as the logits, amplified by alpha.
        tolerance: relative error to allow in a weight, hence absolute in the CDF (and twice that in a logprob).
    """

    def __init__(self, aligned: Tensor, base: Tensor, options: Options) -> None:
        self.options = options
        self.aligned, self.base = aligned[: options.vocab_size], base[: options.vocab_size]
        present = present_entries([self.aligned, self.base])
        self.bad = present is None
        if present is None:
            return
        self.present = np.array(present)
        self.a, self.b = (model.double().numpy()[self.present] for model in (self.aligned, self.base))
        self.epsilon = torch.finfo(torch.float64 if aligned.dtype == torch.float64 else torch.float32).eps
        largest = float(max(np.abs(self.a).max(), np.abs(self.b).max()))
        self.slack = 4 * self.epsilon * (1 + options.alpha) * (1 + largest)
        self.near = 4 * self.epsilon * (1 + largest)
        self.tolerance = 16 * self.epsilon + (self.slack / options.temperature if options.temperature > 0 else 0.0)

    def contrasted(self) -> Iterator[Entries]:
        """Eq. 7, descending, for every way that entries near the threshold can fall."""
        log_p, log_q = (softmax_logs(torch.from_numpy(logits)).numpy() for logits in (self.a, self.b))
        log_ratio = log_q - log_p
        in_logits = self.options.space == "logits"
        difference = difference_in_compute_dtype(self.base, self.aligned).numpy()[self.present]
        amount = np.maximum(difference, 0.0) if in_logits else log_ratio
        favored = log_ratio > self.near
        unclear = (np.abs(log_ratio) <= self.near) & (amount > 0)
        if not in_logits:  # next to nothing is taken off near the threshold, favored or not
            favored, unclear = favored | unclear, np.zeros_like(favored)
        if self.options.alpha == 0 or np.array_equal(self.a, self.b):
            favored, unclear = np.zeros_like(favored), np.zeros_like(favored)
        places = unclear.nonzero()[0]
        assert len(places) <= 6, "too many entries near the threshold to enumerate: choose other logits"
        for choice in itertools.product((False, True), repeat=len(places)):
            lowered = favored.copy()
            lowered[places] = choice
            lowered &= amount > 0
            x = np.where(lowered, self.a - self.options.alpha * amount, self.a)
            order = np.argsort(-x, kind="stable")
            yield Entries(self.present[order], x[order], order, lowered[order])

    def origin(self, entries: Entries, n: int) -> tuple[float, ...]:
        """Entries of equal origin have bitwise equal x in any implementation."""
        place = entries.place[n]
        return (self.a[place], self.b[place]) if entries.lowered[n] else (self.a[place],)

    def first(self, entries: Entries, count: int) -> Iterator[Entries]:
        """The `count` first of descending entries, for every way that near ties at the end can fall."""
        if count >= len(entries.x):
            yield entries
            return
        edge = entries.x[count - 1]
        sure = int((entries.x > edge + self.slack).sum())
        near: dict[tuple[float, ...], list[int]] = {}
        for n in (np.abs(entries.x - edge) <= self.slack).nonzero()[0].tolist():
            near.setdefault(self.origin(entries, n), []).append(n)
        for counts in itertools.product(*(range(len(group) + 1) for group in near.values())):
            if sure + sum(counts) == count:
                chosen = [n for group, most in zip(near.values(), counts, strict=True) for n in group[:most]]
                yield entries[np.array([*range(sure), *sorted(chosen)])]

    def top_p(self, entries: Entries) -> Iterator[Entries]:
        if self.options.top_p == 1:
            yield entries
            return
        cumulative = self.weights(entries).cumsum()
        low, high = (
            min(int(np.searchsorted(cumulative, share * cumulative[-1])) + 1, len(cumulative))
            for share in (self.options.top_p - self.tolerance, self.options.top_p + self.tolerance)
        )
        for count in range(low, high + 1):
            yield from self.first(entries, count)

    def min_p(self, entries: Entries) -> Iterator[Entries]:
        weights, bound = self.weights(entries), self.options.min_p
        tied = (entries.x == entries.x[0]).nonzero()[0].tolist()
        equal = sum(self.origin(entries, n) == self.origin(entries, 0) for n in tied)
        low = max(equal, int((weights >= bound * (1 + self.tolerance)).sum()))
        high = max(equal, int((weights >= bound * (1 - self.tolerance)).sum()))
        for count in range(low, high + 1):
            yield from self.first(entries, count)

    def weights(self, entries: Entries) -> np.ndarray:
        """Relative to the largest, which is the first."""
        return np.exp((entries.x - entries.x[0]) / self.options.temperature)

    def distributions(self) -> Iterator[list[tuple[int, float]]]:
        """(index, weight) in index order of what may be drawn, for every way that rounding can fall."""
        for index, weights in self._distributions():
            yield list(zip(index.tolist(), weights.tolist(), strict=True))

    def _distributions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for entries in self.contrasted():
            if self.options.temperature == 0:
                yield from ((best.index, np.ones(1)) for best in self.first(entries, 1))
                continue
            for in_k in self.first(entries, self.options.top_k or len(entries.x)):
                for in_p in self.top_p(in_k):
                    for kept in self.min_p(in_p):
                        order = kept.index.argsort()
                        yield kept.index[order], self.weights(kept)[order]

    def allows(self, uniform: float, token: int, logprob: float) -> bool:
        """Whether this token and log-probability can come of this uniform."""
        if self.bad:
            return token == -1 and math.isnan(logprob)
        with np.errstate(over="ignore"):
            return any(self._drawn_from(*kept, uniform, token, logprob) for kept in self._distributions())

    def _drawn_from(self, index: np.ndarray, weights: np.ndarray, uniform: float, token: int, logprob: float) -> bool:
        place = int(np.searchsorted(index, token))
        if place == len(index) or index[place] != token or weights[place] == 0:
            return False
        total, before, weight = math.fsum(weights), math.fsum(weights[:place]), float(weights[place])
        in_reach = before / total - self.tolerance <= uniform < (before + weight) / total + self.tolerance
        error = abs(logprob - math.log(weight / total))
        return in_reach and error <= 2 * self.tolerance + self.epsilon * abs(logprob)


def check_sample(
    aligned: Tensor, base: Tensor, uniforms: Tensor, *, implementation: str, **options: object
) -> ContrastiveSample:
    """Draw, and hold every row against the oracle."""
    result = contrastive_sample(aligned, base, uniforms=uniforms, implementation=implementation, **options)
    assert isinstance(result, ContrastiveSample)
    assert result.token_ids.dtype == torch.int64
    assert result.logprobs.dtype == (torch.float64 if aligned.dtype == torch.float64 else torch.float32)
    assert result.token_ids.shape == result.logprobs.shape == aligned.shape[:-1]
    width = aligned.shape[-1]
    rows = zip(
        aligned.reshape(-1, width),
        base.reshape(-1, width),
        uniforms.reshape(-1).tolist(),
        result.token_ids.reshape(-1).tolist(),
        result.logprobs.reshape(-1).tolist(),
        strict=True,
    )
    for n, (a, b, uniform, token, logprob) in enumerate(rows):
        row = Row(a, b, Options(**options))
        assert row.allows(uniform, token, logprob), f"row {n}: token {token}, logprob {logprob} from u = {uniform}"
    return result


def two_models(*shape: int, dtype: torch.dtype = torch.float32, peaked: bool = True, seed: int = 0) -> list[Tensor]:
    return three_models(*shape, dtype=dtype, peaked=peaked, seed=seed)[1:]


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(count: int) -> Tensor:
    """Midpoints of `count` equal parts of [0, 1): a token of probability p is drawn count * p times, up to one."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def draw(logits: Iterable[float], uniforms: Tensor, **options: object) -> ContrastiveSample:
    """Draw from one row of logits for every uniform, without a contrast."""
    logits_NV = torch.tensor(list(logits)).expand(len(uniforms), -1)
    return contrastive_sample(logits_NV, logits_NV, alpha=1.0, uniforms=uniforms, **options)


def support(logits: Iterable[float], **options: object) -> list[int]:
    """Tokens that the filters keep, none of which may be less probable than 1/512."""
    return draw(logits, torch.cat([grid(1024), float64(0.0, BELOW_ONE)]), **options).token_ids.unique().tolist()

"""Contrastive sampling once more, independently: one row at a time, Python lists and sorts, float64.

Rounding of x in the precision that an implementation computes in may fall either way where two entries are nearly equal
or where a threshold is nearly met. So a row has a few distributions, one for each way that these can fall, and the
token has to be drawn from one of them. Exact ties are no such case: they go to the lowest index.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_FOR
from deepalign.kernels.contrastive_sample import IMPLEMENTATIONS, ContrastiveSample, contrastive_sample
from tests.kernels.oracle import difference_in_compute_dtype, present_entries, softmax_logs
from tests.kernels.samples import DTYPES, three_models

# Those that run on the CPU's tensors.
RUNNABLE = [
    name
    for name, found in IMPLEMENTATIONS.items()
    if not isinstance(found, str) and COMPILED_FOR.get(name, "cpu") == "cpu"
]
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


class Entry(NamedTuple):
    index: int
    x: float
    origin: tuple[float, ...]  # entries of equal origin have bitwise equal x in any implementation


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
        self.present = present or []
        if self.bad:
            return
        self.a, self.b = (model.double()[self.present].tolist() for model in (self.aligned, self.base))
        self.epsilon = torch.finfo(torch.float64 if aligned.dtype == torch.float64 else torch.float32).eps
        largest = max(abs(value) for value in self.a + self.b)
        self.slack = 4 * self.epsilon * (1 + options.alpha) * (1 + largest)
        self.tolerance = 16 * self.epsilon + (self.slack / options.temperature if options.temperature > 0 else 0.0)

    def contrasted(self) -> Iterator[list[Entry]]:
        """Eq. 7, descending, for every way that entries near the threshold can fall."""
        log_p, log_q = (softmax_logs(float64(*logits)) for logits in (self.a, self.b))
        log_ratio = (log_q - log_p).tolist()
        difference = difference_in_compute_dtype(self.base, self.aligned)[self.present].tolist()
        in_logits = self.options.space == "logits"
        amount = [max(d, 0.0) if in_logits else ratio for d, ratio in zip(difference, log_ratio, strict=True)]
        near = 4 * self.epsilon * (1 + max(abs(value) for value in self.a + self.b))
        favored = {i for i, ratio in enumerate(log_ratio) if ratio > near}
        unclear = [i for i, ratio in enumerate(log_ratio) if abs(ratio) <= near and amount[i] > 0]
        if not in_logits:  # next to nothing is taken off near the threshold, favored or not
            favored, unclear = favored | set(unclear), []
        if self.a == self.b or self.options.alpha == 0:
            favored, unclear = set(), []
        assert len(unclear) <= 6, "too many entries near the threshold to enumerate: choose other logits"
        for choice in itertools.product((False, True), repeat=len(unclear)):
            lowered = favored | set(itertools.compress(unclear, choice))
            entries = [
                Entry(index, a - self.options.alpha * amount[i], (a, b))
                if i in lowered and amount[i] > 0
                else Entry(index, a, (a,))
                for i, (index, a, b) in enumerate(zip(self.present, self.a, self.b, strict=True))
            ]
            yield sorted(entries, key=lambda entry: (-entry.x, entry.index))

    def first(self, entries: list[Entry], count: int) -> Iterator[list[Entry]]:
        """The `count` first of descending entries, for every way that near ties at the end can fall."""
        if count >= len(entries):
            yield entries
            return
        edge = entries[count - 1].x
        sure = [entry for entry in entries if entry.x > edge + self.slack]
        near: dict[tuple[float, ...], list[Entry]] = {}
        for entry in entries:
            if abs(entry.x - edge) <= self.slack:
                near.setdefault(entry.origin, []).append(entry)
        for counts in itertools.product(*(range(len(group) + 1) for group in near.values())):
            if len(sure) + sum(counts) == count:
                chosen = [entry for group, n in zip(near.values(), counts, strict=True) for entry in group[:n]]
                yield sorted(sure + chosen, key=lambda entry: (-entry.x, entry.index))

    def top_p(self, entries: list[Entry]) -> Iterator[list[Entry]]:
        if self.options.top_p == 1:
            yield entries
            return
        cumulative = list(itertools.accumulate(self.weights(entries)))
        low, high = (
            next((n for n, mass in enumerate(cumulative, 1) if mass >= share * cumulative[-1]), len(entries))
            for share in (self.options.top_p - self.tolerance, self.options.top_p + self.tolerance)
        )
        for count in range(low, high + 1):
            yield from self.first(entries, count)

    def min_p(self, entries: list[Entry]) -> Iterator[list[Entry]]:
        weights, bound = self.weights(entries), self.options.min_p
        equal = sum(entry.origin == entries[0].origin for entry in entries)
        low = max(equal, sum(weight >= bound * (1 + self.tolerance) for weight in weights))
        high = max(equal, sum(weight >= bound * (1 - self.tolerance) for weight in weights))
        for count in range(low, high + 1):
            yield from self.first(entries, count)

    def weights(self, entries: list[Entry]) -> list[float]:
        """Relative to the largest, which is the first."""
        return [math.exp((entry.x - entries[0].x) / self.options.temperature) for entry in entries]

    def distributions(self) -> Iterator[list[tuple[int, float]]]:
        """(index, weight) in index order of what may be drawn, for every way that rounding can fall."""
        for entries in self.contrasted():
            if self.options.temperature == 0:
                yield from ([(best.index, 1.0)] for (best,) in self.first(entries, 1))
                continue
            for in_k in self.first(entries, self.options.top_k or len(entries)):
                for in_p in self.top_p(in_k):
                    for kept in self.min_p(in_p):
                        yield sorted((e.index, w) for e, w in zip(kept, self.weights(kept), strict=True))

    def allows(self, uniform: float, token: int, logprob: float) -> bool:
        """Whether this token and log-probability can come of this uniform."""
        if self.bad:
            return token == -1 and math.isnan(logprob)
        return any(self._drawn_from(kept, uniform, token, logprob) for kept in self.distributions())

    def _drawn_from(self, kept: list[tuple[int, float]], uniform: float, token: int, logprob: float) -> bool:
        total = math.fsum(weight for _, weight in kept)
        weight = dict(kept).get(token, 0.0)
        if weight == 0:
            return False
        before = math.fsum(weight for index, weight in kept if index < token)
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

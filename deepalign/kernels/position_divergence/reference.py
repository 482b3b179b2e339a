"""The position statistics, in eager PyTorch, per row of aligned logits a and base logits b at temperature 1.

With p_a = softmax(a), p_b = softmax(b) over the V present entries, d = b - a, m = (p_a + p_b) / 2, natural logarithms:

    favored           {v : log p_b(v) > log p_a(v)} = {v : d_v > lse(b) - lse(a)}        base-favored tokens (Eq. 6)
    kl, reverse_kl    KL(p_a || p_b), KL(p_b || p_a)
    jsd               (KL(p_a || m) + KL(p_b || m)) / 2, in [0, log 2]
    top_overlap       |top_n(a) n top_n(b)| / min(n, V)
    favored_in_top    |favored n top_n(a)|
    base-favored top  the k largest d, descending                                                (Alg. 1, Def. 3)

Every top-k breaks ties to the lowest index. All arithmetic is float32 on the values of the inputs (float64 for
float64). An entry that is -inf in both models is absent; a bad row has statistics NaN, counts 0 and indices -1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from deepalign.kernels.checks import compute_dtype
from deepalign.kernels.eager_math import (
    RowState,
    classify_rows,
    log_partition,
    partition_difference,
    probabilities,
    readable_values,
    top_k_lowest_index,
)


class PositionDivergence(NamedTuple):
    """Statistics per row, (...,) each: float32 (float64 for float64 logits), the counts int64."""

    kl: Tensor
    reverse_kl: Tensor
    jsd: Tensor
    top_overlap: Tensor
    favored_count: Tensor
    favored_in_top: Tensor


class BaseFavoredTokens(NamedTuple):
    """The entries that the base model raises most over the aligned one, descending by d = b - a."""

    indices: Tensor  # (..., k) int64, -1 where fewer than k entries are present
    differences: Tensor  # (..., k) float32 (float64 for float64 logits), -inf where the index is -1
    # (...,) int64, base-favored entries of the whole vocabulary; shadows tuple.count, which nobody calls here
    count: Tensor  # type: ignore[assignment]


class _Pair(NamedTuple):
    """Two models' readable rows, their partitions, and what follows from them."""

    a_NV: Tensor
    b_NV: Tensor
    partition_a: tuple[Tensor, Tensor]
    partition_b: tuple[Tensor, Tensor]
    log_ratio_NV: Tensor  # log p_b - log p_a, only compared and multiplied where present
    favored_NV: Tensor
    state: RowState


@torch.no_grad()
def position_divergence_rows(aligned_NV: Tensor, base_NV: Tensor, top_n: int, vocab_size: int) -> PositionDivergence:
    """Statistics of (..., V) logits; inputs are validated."""
    pair = _read_pair(aligned_NV, base_NV, vocab_size)
    present_NV, bad_N = pair.state.present_NV, pair.state.bad_N
    pa_NV = probabilities(pair.a_NV, pair.partition_a, present_NV)
    pb_NV = probabilities(pair.b_NV, pair.partition_b, present_NV)
    log_ratio_NV = pair.log_ratio_NV
    jsd_NV = pa_NV * _log_share(-log_ratio_NV) + pb_NV * _log_share(log_ratio_NV)

    top_a_NK, in_a_NK = top_k_lowest_index(pair.a_NV, present_NV, top_n)
    top_b_NK, in_b_NK = top_k_lowest_index(pair.b_NV, present_NV, top_n)
    member_NV = torch.zeros_like(present_NV).scatter(-1, top_a_NK, True)
    shared_N = (member_NV.gather(-1, top_b_NK) & in_b_NK).sum(-1)  # what b has present, a has too
    overlap_N = shared_N.to(pa_NV.dtype) / in_a_NK.sum(-1).to(pa_NV.dtype)
    favored_in_top_N = (pair.favored_NV.gather(-1, top_a_NK) & in_a_NK).sum(-1)
    return PositionDivergence(
        kl=_or_nan(-(pa_NV * log_ratio_NV).sum(-1), bad_N),
        reverse_kl=_or_nan((pb_NV * log_ratio_NV).sum(-1), bad_N),
        jsd=_or_nan(0.5 * jsd_NV.sum(-1), bad_N),
        top_overlap=_or_nan(overlap_N, bad_N),
        favored_count=torch.where(bad_N, 0, pair.favored_NV.sum(-1)),
        favored_in_top=torch.where(bad_N, 0, favored_in_top_N),
    )


@torch.no_grad()
def base_favored_tokens_rows(aligned_NV: Tensor, base_NV: Tensor, top_k: int, vocab_size: int) -> BaseFavoredTokens:
    """The k largest d of (..., V) logits; inputs are validated."""
    pair = _read_pair(aligned_NV, base_NV, vocab_size)
    difference_NV, bad_N1 = pair.b_NV - pair.a_NV, pair.state.bad_N[..., None]
    index_NK, found_NK = top_k_lowest_index(difference_NV, pair.state.present_NV, top_k)
    top_NK = torch.where(found_NK, difference_NV.gather(-1, index_NK), -math.inf)
    return BaseFavoredTokens(
        indices=torch.where(found_NK & ~bad_N1, index_NK, -1),
        differences=_or_nan(top_NK, bad_N1),
        count=torch.where(pair.state.bad_N, 0, pair.favored_NV.sum(-1)),
    )


def _read_pair(aligned_NV: Tensor, base_NV: Tensor, vocab_size: int) -> _Pair:
    cut = (aligned_NV.detach()[..., :vocab_size], base_NV.detach()[..., :vocab_size])
    state = classify_rows(cut)
    a_NV, b_NV = (readable_values(logits_NV, state, compute_dtype(aligned_NV)) for logits_NV in cut)
    partition_a, partition_b = log_partition(a_NV, state.present_NV), log_partition(b_NV, state.present_NV)
    threshold_N1 = partition_difference(partition_b, partition_a)
    difference_NV = b_NV - a_NV
    favored_NV = (difference_NV > threshold_N1) & state.present_NV
    return _Pair(a_NV, b_NV, partition_a, partition_b, difference_NV - threshold_N1, favored_NV, state)


def _log_share(log_ratio: Tensor) -> Tensor:
    """log(2 p / (p + q)) from u = log p - log q.

    1 + tanh(u / 2) = 2 p / (p + q): near u = 0 this keeps the digits that log 2 - softplus(-u) would cancel, which is
    where the two sums of the divergence cancel too; far below 0 the second form keeps them.
    """
    return torch.where(
        log_ratio > -1.0,
        torch.log1p(torch.tanh(0.5 * log_ratio)),
        math.log(2.0) + torch.nn.functional.logsigmoid(log_ratio),
    )


def _or_nan(value: Tensor, bad: Tensor) -> Tensor:
    return torch.where(bad, math.nan, value)

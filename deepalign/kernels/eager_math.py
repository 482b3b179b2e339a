"""Eager row arithmetic that the reference implementations share: which entries to read, partitions, top-k.

Logits are (..., V); shape suffixes write N for any leading shape. An entry that is -inf in every model is absent, like
padding. A row is bad if an entry is NaN or +inf, or -inf in some models only, or if no entry is present. Rows are made
harmless BEFORE any arithmetic: autograd through `where` over -inf or NaN yields NaN gradients (0 * inf).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowState(NamedTuple):
    """What may be read; all bool."""

    read_NV: Tensor  # entries whose values are read: the finite ones of usable rows
    present_NV: Tensor  # entries that take part: those, and all of the other rows, where 0 stands for every value
    bad_N: Tensor
    usable_N: Tensor  # neither bad nor left out


def classify_rows(logits: Sequence[Tensor], active_N: Tensor | None = None) -> RowState:
    """Find present entries and bad rows.

    Args:
        logits: the models' logits, (N, V) each, cut to the entries that exist.
        active_N: (N,) bool, rows to read; None reads all. A row that is not active is neither bad nor usable.
    """
    finite_NV = torch.isfinite(logits[0])
    absent_NV = logits[0] == -math.inf
    for other_NV in logits[1:]:
        finite_NV = finite_NV & torch.isfinite(other_NV)
        absent_NV = absent_NV & (other_NV == -math.inf)
    sound_N = (finite_NV | absent_NV).all(-1) & finite_NV.any(-1)
    usable_N = sound_N if active_N is None else sound_N & active_N
    bad_N = ~sound_N if active_N is None else ~sound_N & active_N
    usable_N1 = usable_N[..., None]
    return RowState(finite_NV & usable_N1, finite_NV | ~usable_N1, bad_N, usable_N)


def readable_values(logits_NV: Tensor, state: RowState, dtype: torch.dtype) -> Tensor:
    """The logits in `dtype`, contiguous, with 0 for absent entries and in rows that are not usable.

    Contiguous, so that equal models give bitwise equal partitions whatever their strides were. Where the logits carry a
    gradient, it is NaN over every bad row: the loss of such a row is a constant, so the NaN has to be put there.
    """
    values_NV = logits_NV.to(dtype)
    if logits_NV.requires_grad:
        values_NV = values_NV * torch.where(state.bad_N, math.nan, 1.0)[..., None].to(dtype)
    return torch.where(state.read_NV, values_NV, 0.0).contiguous()


def log_partition(values_NV: Tensor, present_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum m_N1 and log(sum exp(values - m))_N1 over present entries.

    They stay apart so that a difference of two partitions is (m - m') + (log S - log S'): exactly 0 for equal rows, and
    no fp32 digits lost to a large common maximum. m carries no gradient: it cancels.
    """
    masked_NV = torch.where(present_NV, values_NV, -math.inf)
    maximum_N1 = masked_NV.detach().amax(-1, keepdim=True)
    return maximum_N1, (masked_NV - maximum_N1).exp().sum(-1, keepdim=True).log()


def partition_difference(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """(N, 1) log-partition of `left` minus that of `right`, exactly 0 when they are equal."""
    return (left[0] - right[0]) + (left[1] - right[1])


def probabilities(values_NV: Tensor, partition: tuple[Tensor, Tensor], present_NV: Tensor) -> Tensor:
    """exp(values - m - log S), 0 at absent entries."""
    return torch.where(present_NV, values_NV - partition[0] - partition[1], -math.inf).exp()


def top_k_lowest_index(values_NV: Tensor, present_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the k largest values, descending, ties to the lowest index, and which of them are present.

    `torch.topk` promises no order among ties, and a stable sort of the whole vocabulary costs ten times more. So: topk
    finds the k-th value; what lies above it is settled; the remaining places go to the first entries equal to it.

    Args:
        values_NV: (N, V), no NaN.
        present_NV: (N, V) bool; absent entries come last.
        k: 1 <= k <= V.

    Returns:
        indices_NK, int64, distinct within a row, and present_NK, bool.
    """
    # -0.0 equals 0.0 here but not in every sort, hence the first where.
    keys_NV = torch.where(present_NV, torch.where(values_NV == 0, 0.0, values_NV), -math.inf)
    vocab_size = keys_NV.shape[-1]
    top_NK, top_index_NK = keys_NV.topk(k, dim=-1)
    kth_N1 = top_NK[..., -1:]
    # Position of the j-th entry equal to the k-th value, in index order: largest "distance from the end" first.
    from_end_V = vocab_size - torch.arange(vocab_size, device=keys_NV.device, dtype=torch.int32)
    tied_NK = vocab_size - torch.where(keys_NV == kth_N1, from_end_V, 0).topk(k, dim=-1).values.long()
    above_NK = top_NK > kth_N1
    rank_K = torch.arange(k, device=keys_NV.device)
    tie_rank_NK = (rank_K - above_NK.sum(-1, keepdim=True)).clamp(min=0)
    index_NK = torch.where(above_NK, top_index_NK, tied_NK.gather(-1, tie_rank_NK)).sort(dim=-1).values
    order_NK = keys_NV.gather(-1, index_NK).sort(dim=-1, descending=True, stable=True).indices
    index_NK = index_NK.gather(-1, order_NK)
    return index_NK, present_NV.gather(-1, index_NK)


def total_of(loss_N: Tensor) -> Tensor:
    """The sum of all rows: on a CPU in double, as in the op that sums by itself; so every way gives the same bits."""
    return loss_N.sum(dtype=torch.float64).to(loss_N.dtype) if loss_N.is_cpu else loss_N.sum()


def divided_by_sum(weight_N: Tensor) -> Tensor:
    """Weights (N,) >= 0 that sum to 1; those that sum to 0 stay 0, without a look at the sum."""
    total = weight_N.sum()
    return torch.where(total > 0, weight_N / total, 0.0)

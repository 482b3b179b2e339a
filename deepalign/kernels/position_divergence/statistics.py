"""All that a diagnosis asks of a row: the position statistics, the most base-favored tokens, those in base's top.

On the CPU one op reads the logits twice for all of it (`csrc/cpu/position_divergence.h`). Elsewhere it is made of the
other ops: `position_divergence`, `base_favored_tokens`, and for base's top

    base's top n           the n largest differences from logits that are all 0
    favored_in_base_top    |{v in base's top n : b_v - a_v > lse(b) - lse(a)}|
    lse                    the logit of a token that the sampler drew, minus its log-probability
"""

from typing import NamedTuple

import torch
from torch import Tensor

from deepalign.kernels.checks import check_logits, check_top, compute_dtype, implementation_name
from deepalign.kernels.contrastive_sample import contrastive_sample
from deepalign.kernels.library import dense_rows
from deepalign.kernels.position_divergence.api import IMPLEMENTATIONS, base_favored_tokens, position_divergence


class PositionStatistics(NamedTuple):
    """Statistics per row, (N,) each, float32 (float64 for float64 logits) and int64, and tokens (N, top_k) int64."""

    kl: Tensor
    reverse_kl: Tensor
    jsd: Tensor
    top_overlap: Tensor
    favored_count: Tensor
    favored_in_top: Tensor
    favored_in_base_top: Tensor  # base-favored entries among base's top n
    favored_tokens: Tensor  # the most base-favored, descending, -1 for none


def position_statistics(
    aligned_NV: Tensor, base_NV: Tensor, *, top_n: int = 100, top_k: int = 100, implementation: str | None = None
) -> PositionStatistics:
    """`position_divergence`, the indices of `base_favored_tokens`, and base-favored entries in base's top n.

    Args:
        aligned_NV, base_NV: (N, V) bf16, fp16, fp32 or fp64; same shape, dtype and device. Carries no gradient.
        top_n: how many largest logits count as a model's top, 1 <= top_n <= V.
        top_k: how many base-favored tokens, 1 <= top_k <= V.
        implementation: of the ops; None to choose by device.

    Raises:
        TypeError, ValueError, RuntimeError: as of `position_divergence` and `base_favored_tokens`.
    """
    vocab_size = check_logits(None, aligned_logits=aligned_NV, base_logits=base_NV)
    check_top("top_n", top_n, vocab_size)
    check_top("top_k", top_k, vocab_size)
    serving = implementation_name(IMPLEMENTATIONS, implementation, aligned_NV.device, compute_dtype(aligned_NV))
    if serving == "cpu":
        aligned, base = dense_rows(aligned_NV.detach()), dense_rows(base_NV.detach())
        return PositionStatistics(*torch.ops.deepalign.position_statistics(aligned, base, top_n, top_k, vocab_size))
    divergence = position_divergence(aligned_NV, base_NV, top_n=top_n, implementation=serving)
    tokens = base_favored_tokens(aligned_NV, base_NV, top_k=top_k, implementation=serving).indices
    in_base_top = _favored_in_base_top(aligned_NV, base_NV, top_n, serving)
    return PositionStatistics(*divergence, torch.where(divergence.kl.isnan(), 0, in_base_top), tokens)


@torch.no_grad()
def _favored_in_base_top(aligned_NV: Tensor, base_NV: Tensor, top_n: int, serving: str) -> Tensor:
    zeros_NV = torch.zeros_like(base_NV).masked_fill_(base_NV == -torch.inf, -torch.inf)  # absent in both, or it is bad
    top_NK = base_favored_tokens(zeros_NV, base_NV, top_k=top_n, implementation=serving).indices
    index_NK = top_NK.clamp(min=0)
    a_NK, b_NK = (logits.gather(-1, index_NK).to(compute_dtype(logits)) for logits in (aligned_NV, base_NV))
    (token_b_N1, log_b_N1), (token_a_N1, log_a_N1) = (_drawn(logits, serving) for logits in (base_NV, aligned_NV))
    shift_N1 = base_NV.gather(-1, token_b_N1).to(b_NK.dtype) - aligned_NV.gather(-1, token_a_N1).to(a_NK.dtype)
    favored_NK = b_NK - a_NK > shift_N1 + (log_a_N1 - log_b_N1)
    return (favored_NK & (top_NK >= 0)).sum(-1)


def _drawn(logits_NV: Tensor, serving: str) -> tuple[Tensor, Tensor]:
    """A token (N, 1) of each row and its log-probability (N, 1), from one fused read."""
    half_N = logits_NV.new_full((len(logits_NV),), 0.5, dtype=torch.float64)
    drawn = contrastive_sample(logits_NV, logits_NV, alpha=0.0, uniforms=half_N, implementation=serving)
    return drawn.token_ids.clamp(min=0)[:, None], drawn.logprobs[:, None]

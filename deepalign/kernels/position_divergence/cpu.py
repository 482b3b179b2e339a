"""The position statistics by the compiled kernels behind the ops: the CPU's, and by the same calls Triton's.

`csrc/cpu/base_favored_tokens.h` and `csrc/cpu/position_divergence.h` have the CPU kernels' essays.
"""

import torch
from torch import Tensor

from deepalign.kernels.library import dense_rows
from deepalign.kernels.position_divergence import op  # noqa: F401  (defines the ops)
from deepalign.kernels.position_divergence.reference import BaseFavoredTokens, PositionDivergence


def position_divergence_rows(aligned_NV: Tensor, base_NV: Tensor, top_n: int, vocab_size: int) -> PositionDivergence:
    """Statistics of (..., V) logits; inputs are validated."""
    aligned, base = dense_rows(aligned_NV.detach()), dense_rows(base_NV.detach())
    statistics = torch.ops.deepalign.position_divergence(aligned, base, top_n, vocab_size)
    rows = aligned_NV.shape[:-1]
    return PositionDivergence(*(statistic.view(rows) for statistic in statistics))


def base_favored_tokens_rows(aligned_NV: Tensor, base_NV: Tensor, top_k: int, vocab_size: int) -> BaseFavoredTokens:
    """The k largest d of (..., V) logits; inputs are validated."""
    aligned, base = dense_rows(aligned_NV.detach()), dense_rows(base_NV.detach())
    indices, differences, count = torch.ops.deepalign.base_favored_tokens(aligned, base, top_k, vocab_size)
    rows = aligned_NV.shape[:-1]
    return BaseFavoredTokens(indices.view(*rows, top_k), differences.view(*rows, top_k), count.view(rows))

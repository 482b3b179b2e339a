"""Contrastive decoding (Eq. 7), in eager PyTorch, per row of aligned logits a and base logits b:

    favored   log p_b(v) > log p_a(v),  that is  d_v > lse(b) - lse(a),  with d = b - a
    x_v       a_v - alpha max(d_v, 0)                   where favored, space="logits"
              a_v - alpha (log p_b(v) - log p_a(v))     where favored, space="logprobs"
              a_v                                       elsewhere

All arithmetic is float32 on the values of the inputs (float64 for float64).
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from deepalign.kernels.checks import check_choice, check_logits, check_number, compute_dtype
from deepalign.kernels.eager_math import classify_rows, log_partition, partition_difference, readable_values

Space = Literal["logits", "logprobs"]


@torch.no_grad()
def contrastive_logits(
    aligned_logits: Tensor,
    base_logits: Tensor,
    *,
    alpha: float,
    space: Space = "logits",
    vocab_size: int | None = None,
) -> Tensor:
    """The logits to sample from (Eq. 7). Carries no gradient.

    Args:
        aligned_logits, base_logits: (..., V) bf16, fp16, fp32 or fp64; same shape, dtype and device. They are the
            models' own: masks such as top-k come after, or -inf would stand in one model only.
        alpha: >= 0, how much of the base model's excess is taken off; 0 leaves `aligned_logits` as they are.
        space: whether the excess is the difference of logits or of log-probabilities.
        vocab_size: only the first `vocab_size` entries exist; None for all V.

    Returns:
        (..., V) float32 (float64 for float64 logits). -inf beyond `vocab_size` and where both models are -inf; NaN over
        the first `vocab_size` entries of a row with NaN, +inf, -inf in one model only, or no entry present.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a value, shape or device that does not fit.
    """
    width = check_logits(vocab_size, aligned_logits=aligned_logits, base_logits=base_logits)
    check_number("alpha", alpha, minimum=0.0)
    check_choice("space", space, get_args(Space))
    cut = (aligned_logits.detach()[..., :width], base_logits.detach()[..., :width])
    state = classify_rows(cut)
    a_NV, b_NV = (readable_values(logits_NV, state, compute_dtype(aligned_logits)) for logits_NV in cut)
    difference_NV = b_NV - a_NV
    partition_a, partition_b = log_partition(a_NV, state.present_NV), log_partition(b_NV, state.present_NV)
    threshold_N1 = partition_difference(partition_b, partition_a)
    excess_NV = difference_NV.clamp(min=0.0) if space == "logits" else difference_NV - threshold_N1
    x_NV = torch.where(difference_NV > threshold_N1, a_NV - alpha * excess_NV, a_NV)
    x_NV = torch.where(state.present_NV, x_NV, -math.inf)
    x_NV = torch.where(state.bad_N[..., None], math.nan, x_NV)
    return torch.nn.functional.pad(x_NV, (0, aligned_logits.shape[-1] - width), value=-math.inf)

"""Contrastive decoding (Eq. 7), in eager PyTorch, per row of aligned logits a and base logits b:

    favored   log p_b(v) > log p_a(v),  that is  d_v > lse(b) - lse(a),  with d = b - a
    x_v       a_v - alpha max(d_v, 0)                   where favored, space="logits"
              a_v - alpha (log p_b(v) - log p_a(v))     where favored, space="logprobs"
              a_v                                       elsewhere

x is float32 on the values of the inputs (float64 for float64). One token is drawn from it with a uniform u in [0, 1):

    w_v       exp((x_v - max x) / temperature), the largest is 1
    order     descending x, ties to the lowest index
    top-k     keeps the first k of the order; 0 keeps all
    top-p     keeps the shortest prefix of those whose share of their sum of w reaches p; 1 keeps all
    min-p     keeps w_v >= min_p
    token     the lowest kept index v with  sum of w over kept entries up to v  >  u * sum of w over all kept
    logprob   log w_token - log(sum of w over all kept)

At temperature 0 the token is the first of the order and its logprob 0. From w on everything is float64, so that only
the rounding of x, which all implementations share, decides which side of a boundary a token falls on.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from deepalign.kernels.checks import check_choice, check_logits, check_number, compute_dtype
from deepalign.kernels.eager_math import (
    classify_rows,
    log_partition,
    partition_difference,
    readable_values,
    top_k_lowest_index,
)

Space = Literal["logits", "logprobs"]


class ContrastiveSample(NamedTuple):
    """One token per row."""

    token_ids: Tensor  # (...,) int64, -1 for a bad row
    logprobs: Tensor  # (...,) float32 (float64 for float64 logits), of the token as it was drawn; NaN for a bad row


class SampleOptions(NamedTuple):
    """How to draw; validated, in plain Python numbers."""

    alpha: float
    temperature: float
    top_k: int  # 0 is off, at most vocab_size
    top_p: float
    min_p: float
    space: Space
    vocab_size: int


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
    # Where nothing is taken off nothing is multiplied: alpha or an excess beyond the dtype's range times 0 is NaN.
    lowered_NV = (difference_NV > threshold_N1) & (excess_NV > 0) & (alpha > 0)
    x_NV = torch.where(lowered_NV, a_NV - alpha * excess_NV, a_NV)
    x_NV = torch.where(state.present_NV, x_NV, -math.inf)
    x_NV = torch.where(state.bad_N[..., None], math.nan, x_NV)
    return torch.nn.functional.pad(x_NV, (0, aligned_logits.shape[-1] - width), value=-math.inf)


@torch.no_grad()
def contrastive_sample_rows(
    aligned_NV: Tensor, base_NV: Tensor, uniforms_N: Tensor, options: SampleOptions
) -> ContrastiveSample:
    """One token per row of (..., V) logits; inputs are validated, uniforms are float64."""
    cut = (logits_NV[..., : options.vocab_size] for logits_NV in (aligned_NV, base_NV))
    x_NV = contrastive_logits(*cut, alpha=options.alpha, space=options.space)
    bad_N = ~(x_NV > -math.inf).any(-1)
    x_NV = torch.where(bad_N[..., None], 0.0, x_NV)
    if options.temperature == 0:
        token_N, logprob_N = _first_maximum(x_NV), torch.zeros_like(x_NV[..., 0])
    else:
        # Differenced before it is divided: no overflow for a tiny temperature, and the maximum's weight is exactly 1.
        exponent_NV = (x_NV.double() - x_NV.amax(-1, keepdim=True).double()) / options.temperature
        weight_NV = exponent_NV.exp()
        token_N, total_N = _draw(torch.where(_kept(x_NV, weight_NV, options), weight_NV, 0.0), uniforms_N)
        logprob_N = exponent_NV.gather(-1, token_N[..., None]).squeeze(-1) - total_N.log()
    return ContrastiveSample(
        token_ids=torch.where(bad_N, -1, token_N),
        logprobs=torch.where(bad_N, math.nan, logprob_N.to(x_NV.dtype)),
    )


def _first_maximum(x_NV: Tensor) -> Tensor:
    """(N,) index of the maximum, the lowest of several: `torch.argmax` promises no order."""
    vocab_size = x_NV.shape[-1]
    index_V = torch.arange(vocab_size, device=x_NV.device)
    return torch.where(x_NV == x_NV.amax(-1, keepdim=True), index_V, vocab_size).amin(-1)


def _kept(x_NV: Tensor, weight_NV: Tensor, options: SampleOptions) -> Tensor:
    """(N, V) bool, what top-k, then top-p, then min-p keep. An absent entry has no weight, kept or not."""
    kept_NV = weight_NV >= options.min_p  # the largest weight is 1
    if options.top_k > 0 or options.top_p < 1:
        order_NK = _descending(x_NV, options.top_k)
        cumulative_NK = weight_NV.gather(-1, order_NK).cumsum(-1)
        in_prefix_NK = torch.ones_like(order_NK, dtype=torch.bool)
        if options.top_p < 1:
            before_NK = torch.nn.functional.pad(cumulative_NK[..., :-1], (1, 0))
            in_prefix_NK = before_NK < options.top_p * cumulative_NK[..., -1:]
        kept_NV = kept_NV & torch.zeros_like(kept_NV).scatter(-1, order_NK, in_prefix_NK)
    return kept_NV


def _descending(x_NV: Tensor, top_k: int) -> Tensor:
    """(N, K) indices in descending order, ties to the lowest index: the first `top_k`, or all for 0."""
    if 0 < top_k < x_NV.shape[-1]:
        return top_k_lowest_index(x_NV, x_NV > -math.inf, top_k)[0]
    # -0.0 equals 0.0 here but not in every sort
    return torch.where(x_NV == 0, 0.0, x_NV).sort(dim=-1, descending=True, stable=True).indices


def _draw(weight_NV: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
    """Token by inverse CDF in index order, and the sum of the weights."""
    vocab_size = weight_NV.shape[-1]
    cumulative_NV = weight_NV.cumsum(-1)
    total_N1 = cumulative_NV[..., -1:]
    # Only an entry with weight may be chosen, whatever rounding does to the sums; the last such one if none is reached.
    index_V = torch.arange(vocab_size, device=weight_NV.device)
    possible_NV = weight_NV > 0
    reached_NV = possible_NV & (cumulative_NV > uniforms_N[..., None] * total_N1)
    first_N = torch.where(reached_NV, index_V, vocab_size).amin(-1)
    last_N = torch.where(possible_NV, index_V, -1).amax(-1)
    return torch.minimum(first_N, last_N), total_N1.squeeze(-1)

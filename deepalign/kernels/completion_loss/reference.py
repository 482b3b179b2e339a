"""The equations of the completion loss, in eager PyTorch. Other implementations cite this file.

Per row, with student logits s, frozen aligned logits a and frozen base logits b over V present entries:

    difference     d = b - a;  s, detached, replaces a if favored_from="student"                         (Alg. 1)
    selected       M = the k largest d, ties to the lowest index, or the entries given           (Alg. 1, Def. 3)
    count          c = #{v : log p_b(v) > log p_a(v)} = #{v : d_v > lse(b) - lse(a)}                      (Eq. 6)
    alpha          alpha = alpha_base (1 + gamma c / V)                                              (Eq. 10, 11)
    completion     C = lambda_reg sum_{v in M} s_v^2;  (s_v - mean s)^2 if penalty="centered_square"      (Eq. 9)
    teacher        t = lambda a + (1 - lambda) b                                                         (Eq. 12)
    distillation   D = tau^2 KL(softmax(s/tau) || softmax(t/tau)), or the reverse direction              (Eq. 14)
    loss           L = wD D + wC alpha C                                                              (Eq. 8, 13)

Gradient, with p = softmax(s/tau), q = softmax(t/tau) (alpha and M carry none):

    dL/ds_v = wD tau p_v ((log p_v - log q_v) - KL(p||q))  [reverse direction: wD tau (p_v - q_v)]
            + wC alpha 2 lambda_reg s_v [v in M]
    centered_square: with e = s - mean s, e_v [v in M] - (1/V) sum_{u in M} e_u takes the place of s_v [v in M].

All arithmetic is float32 on the values of the inputs (float64 for float64): bf16 spacing at |z| ~ 16 is 0.125, and a
difference rounded to it would be all ties. Autograd differentiates these functions; they are the slow, plain form.
"""

import math

import torch
from torch import Tensor

from deepalign.kernels.checks import compute_dtype
from deepalign.kernels.completion_loss.config import CompletionLossConfig, CompletionLossInputs, CompletionLossOutput
from deepalign.kernels.eager_math import (
    RowState,
    classify_rows,
    log_partition,
    partition_difference,
    probabilities,
    readable_values,
    top_k_lowest_index,
    total_of,
)


def completion_loss_rows(
    student_NV: Tensor, inputs: CompletionLossInputs, *, total: bool = False
) -> CompletionLossOutput:
    """The weighted loss of every row and its statistics; differentiable in the student.

    Args:
        student_NV: (..., V) logits, of the dtype of the others.
        inputs: everything else, validated.
        total: the sum of the losses instead.

    Returns:
        `CompletionLossOutput` with `loss` of shape (...,), or (), a total.
    """
    config, kl_weight_N, completion_weight_N = inputs.config, inputs.kl_weight_N, inputs.completion_weight_N
    models = (student_NV, inputs.aligned_NV.detach(), inputs.base_NV.detach())
    cut = [logits_NV[..., : inputs.vocab_size] for logits_NV in models]
    state = classify_rows([logits_NV.detach() for logits_NV in cut], (kl_weight_N > 0) | (completion_weight_N > 0))
    dtype = compute_dtype(student_NV)
    s_NV, a_NV, b_NV = (readable_values(logits_NV, state, dtype) for logits_NV in cut)

    reference_NV = s_NV.detach() if config.favored_from == "student" else a_NV
    difference_NV = b_NV - reference_NV
    count_N = _base_favored_count(difference_NV, reference_NV, b_NV, state.present_NV)
    risk_N = count_N.to(dtype) / state.present_NV.sum(-1).to(dtype)
    alpha_N = config.alpha_base * (1.0 + config.gamma * risk_N)
    selected_NK, members_NK = _select(difference_NV, state.present_NV, inputs.top_k_indices_NK, config.top_k)
    completion_N = _completion(s_NV, members_NK, state.present_NV, config)
    kl_N = _distillation(s_NV, a_NV + (1.0 - config.teacher_mix) * (b_NV - a_NV), state.present_NV, config)

    # A weight of 0 must remove its term even where the term overflowed: 0 * inf is NaN.
    loss_N = torch.where(kl_weight_N > 0, kl_weight_N * kl_N, 0.0)
    loss_N = loss_N + torch.where(completion_weight_N > 0, completion_weight_N * (alpha_N * completion_N), 0.0)
    loss_N = _or_fill(loss_N, state)
    return CompletionLossOutput(
        loss=total_of(loss_N) if total else loss_N,
        kl=_or_fill(kl_N.detach(), state),
        completion=_or_fill(completion_N.detach(), state),
        alpha=_or_fill(alpha_N, state),
        base_favored_count=torch.where(state.usable_N, count_N, 0),
        top_k_indices=torch.where(state.usable_N[..., None], selected_NK, -1),
    )


def completion_loss_rows_and_gradient(
    student_NV: Tensor, inputs: CompletionLossInputs, gradient_NV: Tensor
) -> CompletionLossOutput:
    """As `completion_loss_rows`, detached; the gradient of the summed loss is written into `gradient_NV`.

    `gradient_NV` may be the student's own buffer. A torch operation writes it, so that its version counter rises.
    """
    with torch.enable_grad():
        leaf_NV = student_NV.detach().requires_grad_()
        output = completion_loss_rows(leaf_NV, inputs)
        (result_NV,) = torch.autograd.grad(output.loss.sum(), leaf_NV)
    gradient_NV.copy_(result_NV)
    return output._replace(loss=output.loss.detach())


def _base_favored_count(difference_NV: Tensor, reference_NV: Tensor, base_NV: Tensor, present_NV: Tensor) -> Tensor:
    threshold_N1 = partition_difference(log_partition(base_NV, present_NV), log_partition(reference_NV, present_NV))
    return ((difference_NV > threshold_N1) & present_NV).sum(-1)


def _select(difference_NV: Tensor, present_NV: Tensor, given_NK: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    """The selection to report, and M as distinct present indices, -1 elsewhere; both (N, K)."""
    if given_NK is None:
        index_NK, found_NK = top_k_lowest_index(difference_NV, present_NV, top_k)
        selected_NK = torch.where(found_NK, index_NK, -1)
        return selected_NK, selected_NK
    sorted_NK = given_NK.sort(dim=-1).values
    repeated_NK = torch.zeros_like(sorted_NK, dtype=torch.bool)
    repeated_NK[..., 1:] = sorted_NK[..., 1:] == sorted_NK[..., :-1]
    exists_NK = (sorted_NK >= 0) & (sorted_NK < present_NV.shape[-1])
    exists_NK = exists_NK & present_NV.gather(-1, torch.where(exists_NK, sorted_NK, 0))
    return given_NK, torch.where(exists_NK & ~repeated_NK, sorted_NK, -1)


def _completion(s_NV: Tensor, members_NK: Tensor, present_NV: Tensor, config: CompletionLossConfig) -> Tensor:
    if config.penalty == "centered_square":
        s_NV = s_NV - s_NV.sum(-1, keepdim=True) / present_NV.sum(-1, keepdim=True).to(s_NV.dtype)
    chosen_NK = s_NV.gather(-1, members_NK.clamp(min=0))
    return config.lambda_reg * torch.where(members_NK >= 0, chosen_NK.square(), 0.0).sum(-1)


def _distillation(s_NV: Tensor, t_NV: Tensor, present_NV: Tensor, config: CompletionLossConfig) -> Tensor:
    tau = config.temperature
    s_NV, t_NV = s_NV / tau, t_NV / tau
    partition_s, partition_t = log_partition(s_NV, present_NV), log_partition(t_NV, present_NV)
    # log p - log q from differences of the logits: exactly 0 when s == t
    log_ratio_NV = (s_NV - t_NV) - partition_difference(partition_s, partition_t)
    if config.kl_direction == "student_teacher":
        divergence_N = (probabilities(s_NV, partition_s, present_NV) * log_ratio_NV).sum(-1)
    else:
        divergence_N = -(probabilities(t_NV, partition_t, present_NV) * log_ratio_NV).sum(-1)
    return tau**2 * divergence_N


def _or_fill(value_N: Tensor, state: RowState) -> Tensor:
    """The value in usable rows, NaN in bad ones, 0 in rows that are not read."""
    return torch.where(state.usable_N, value_N, torch.where(state.bad_N, math.nan, 0.0).to(value_N.dtype))

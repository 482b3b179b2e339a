"""The public completion loss: validates, normalises the row weights, chooses an implementation, reduces."""

from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from deepalign.kernels.checks import (
    check_choice,
    check_logits,
    check_row_weight,
    check_top,
    check_top_k_indices,
    choose_implementation,
    compute_dtype,
    is_plain,
    storable,
)
from deepalign.kernels.completion_loss import cpu
from deepalign.kernels.completion_loss.config import CompletionLossConfig, CompletionLossInputs, CompletionLossOutput
from deepalign.kernels.completion_loss.inplace import RowsAndGradient, completion_loss_rows_inplace
from deepalign.kernels.completion_loss.op import OP_INTO, CompletionLossRows, config_arguments
from deepalign.kernels.completion_loss.reference import completion_loss_rows, completion_loss_rows_and_gradient
from deepalign.kernels.eager_math import divided_by_sum, total_of
from deepalign.kernels.library import WHY_NO_NATIVE, WHY_NO_TRITON
from deepalign.kernels.upstream import has_tangent

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = get_args(Reduction)
STUDENTS = frozenset({Tensor, Parameter})
PAPER_CONFIG = CompletionLossConfig()  # frozen, so one instance serves every call


class Rows(Protocol):
    """The weighted losses of the rows (...,), or their total (), and the statistics of each row."""

    def __call__(
        self, student_NV: Tensor, inputs: CompletionLossInputs, *, total: bool = False
    ) -> CompletionLossOutput: ...


class Implementation(NamedTuple):
    """What a file beside this one provides."""

    rows: Rows  # loss per row, or their sum, differentiable in the student
    rows_and_gradient: RowsAndGradient  # the same, detached; writes the gradient into its last argument


NATIVE = WHY_NO_NATIVE or Implementation(cpu.completion_loss_rows, cpu.completion_loss_rows_and_gradient)
# By name: an implementation, or why it cannot run.
IMPLEMENTATIONS: dict[str, Implementation | str] = {
    "reference": Implementation(completion_loss_rows, completion_loss_rows_and_gradient),
    "cpu": NATIVE,
    # The same functions: the ops they call have a kernel per device.
    "triton": WHY_NO_TRITON or Implementation(cpu.completion_loss_rows, cpu.completion_loss_rows_and_gradient),
}


def fused_completion_loss(
    student_logits: Tensor,
    aligned_logits: Tensor,
    base_logits: Tensor,
    *,
    kl_weight: Tensor | None = None,
    completion_weight: Tensor | None = None,
    top_k_indices: Tensor | None = None,
    config: CompletionLossConfig = PAPER_CONFIG,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    inplace: bool = False,
    implementation: str | None = None,
) -> CompletionLossOutput:
    """Distillation to a mixed teacher plus a penalty on base-favored tokens (Eq. 8 to 14; `reference.py` has them all).

    Args:
        student_logits: (..., V) bf16, fp16, fp32 or fp64; the gradient flows to these only.
        aligned_logits, base_logits: (..., V) of the frozen models; same shape, dtype and device.
        kl_weight, completion_weight: (...,) bool, integer or floating, >= 0: how much a row counts in each term;
            None means 1 everywhere. A row whose two weights are 0 is not read. No gradient flows to them.
        top_k_indices: (..., K) int64, the selected set M given instead of found: -1 is none, duplicates count once.
        config: parameters of the loss.
        vocab_size: only the first `vocab_size` entries exist (padded vocabularies); None for all V.
        reduction: "mean" divides each term by the sum of its own weights (0 if they sum to 0), "sum" does not divide,
            "none" returns the weighted loss per row.
        inplace: overwrite the buffer of `student_logits` with the gradient, for upstream gradient 1. They must not be
            used afterwards. Without effect where no gradient is needed.
        implementation: "reference", "cpu", "triton", or None to choose by device.

    Returns:
        `CompletionLossOutput`. A row with NaN, +inf, or -inf in some models only has loss and gradient NaN and
        disturbs no other row's; an entry that is -inf in all three models is absent, like padding.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a value, shape or device that does not fit, or `inplace=True` on logits not to be overwritten.
        RuntimeError: the implementation cannot run.
    """
    if inplace is False and top_k_indices is None and implementation in (None, "cpu"):
        models, weights = (student_logits, aligned_logits, base_logits), (kl_weight, completion_weight)
        output = _at_once(models, weights, config, vocab_size, reduction)
        if output is not None:
            return output
    check_settings(config, reduction, inplace=inplace)
    vocab_size = check_logits(
        vocab_size, student_logits=student_logits, aligned_logits=aligned_logits, base_logits=base_logits
    )
    check_selection(config, top_k_indices, student_logits, vocab_size)
    kl_weight_N, completion_weight_N = row_weights(kl_weight, completion_weight, student_logits, reduction)
    chosen = choose_implementation(IMPLEMENTATIONS, implementation, student_logits.device, student_logits.dtype)
    inputs = CompletionLossInputs(
        aligned_logits.detach() if aligned_logits.requires_grad else aligned_logits,
        base_logits.detach() if base_logits.requires_grad else base_logits,
        kl_weight_N,
        completion_weight_N,
        top_k_indices,
        config,
        vocab_size,
    )
    if inplace and torch.is_grad_enabled() and student_logits.requires_grad:
        output = completion_loss_rows_inplace(chosen.rows_and_gradient, student_logits, inputs)
        return output if reduction == "none" else output._replace(loss=total_of(output.loss))
    return chosen.rows(student_logits, inputs, total=reduction != "none")


def _at_once(
    models: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
    config: CompletionLossConfig,
    vocab_size: int | None,
    reduction: str,
) -> CompletionLossOutput | None:
    """A call as most are: plain CPU tensors, logits (N, V), the defaults elsewhere. None leaves it to the checks.

    The checks that say what is wrong and the operations on tensors around the op touch so much of the interpreter and
    of torch that, when other code had the caches, they take as long as ten rows of 32000 entries.
    """
    student_NV, aligned_NV, base_NV = models
    kl_weight_N, completion_weight_N = weights
    if (
        is_dynamo_compiling()
        or WHY_NO_NATIVE
        or IMPLEMENTATIONS["cpu"] is not NATIVE
        or type(config) is not CompletionLossConfig
        or not (vocab_size is None or type(vocab_size) is int)
        or not (type(reduction) is str and reduction in REDUCTIONS)
        or not (type(student_NV) in STUDENTS and student_NV.is_cpu and student_NV.dim() == 2)
        or has_tangent(student_NV)
        or not (is_plain(aligned_NV) and is_plain(base_NV))
        or not (kl_weight_N is None or (is_plain(kl_weight_N) and kl_weight_N.dim() == 1))
        or not (completion_weight_N is None or (is_plain(completion_weight_N) and completion_weight_N.dim() == 1))
    ):
        return None
    width = student_NV.shape[1]
    arguments = (
        aligned_NV,
        base_NV,
        kl_weight_N,
        completion_weight_N,
        None,
        *config_arguments(config),
        width if vocab_size is None else vocab_size,
    )
    mean, total = reduction == "mean", reduction != "none"
    try:  # the op checks what is left
        if torch.is_grad_enabled() and student_NV.requires_grad:
            return CompletionLossOutput(*CompletionLossRows.apply(student_NV, arguments, mean, total))
        return CompletionLossOutput(*OP_INTO(student_NV, *arguments, None, mean, total))
    except (RuntimeError, TypeError):
        return None


def check_settings(config: CompletionLossConfig, reduction: str, **flags: bool) -> None:
    """Check what both forms of the loss take beside tensors.

    Raises:
        TypeError: `config` is no `CompletionLossConfig`, or a flag no bool.
        ValueError: an unknown `reduction`.
    """
    if not isinstance(config, CompletionLossConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a CompletionLossConfig")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {flag!r}; expected True or False")
    check_choice("reduction", reduction, REDUCTIONS)


def check_selection(config: CompletionLossConfig, top_k_indices: Tensor | None, rows: Tensor, vocab_size: int) -> None:
    """Check M, given (..., K) or to be found, against the rows of a tensor (..., anything) and their entries."""
    if top_k_indices is None:
        check_top("top_k", config.top_k, vocab_size)
    check_top_k_indices(top_k_indices, rows, vocab_size)


def row_weights(
    kl_weight: Tensor | None, completion_weight: Tensor | None, rows: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """Both row weights (...,), checked against a tensor (..., anything), such that the sum over rows is the reduction.

    Raises:
        TypeError, ValueError: as of `check_row_weight`.
    """
    return (
        _row_weight("kl_weight", kl_weight, rows, reduction),
        _row_weight("completion_weight", completion_weight, rows, reduction),
    )


def _row_weight(name: str, weight: Tensor | None, rows: Tensor, reduction: str) -> Tensor:
    if weight is not None or torch.compiler.is_compiling():
        weight_N = storable(check_row_weight(name, weight, rows))
        return divided_by_sum(weight_N) if reduction == "mean" else weight_N
    # Every row alike: known without an operation on tensors, of which each costs what some hundred entries cost.
    shape = rows.shape[:-1]
    value = 1.0 / max(1, shape.numel()) if reduction == "mean" else 1.0
    return torch.full(shape, value, dtype=compute_dtype(rows), device=rows.device)

"""The completion loss that overwrites the student's logits with their gradient: no second logits-sized buffer.

The gradient for upstream gradient 1 is computed in the forward and kept in the student's buffer; the backward hands
that buffer on. Autograd guards it: the write raises the buffer's version, so that an earlier operation that saved these
logits fails loudly in its backward, and so does this one if anything wrote to the buffer in between.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from deepalign.kernels.completion_loss.config import CompletionLossInputs, CompletionLossOutput
from deepalign.kernels.upstream import first_derivative_only, take_saved, times_upstream

RowsAndGradient = Callable[[Tensor, CompletionLossInputs, Tensor], CompletionLossOutput]


# It writes to its input behind autograd's back. Not `torch.compiler.disable`, which imports the whole compiler, and
# Triton with it, for seconds, as soon as this file is imported; this imports it when the function is called.
@_disable_dynamo
def completion_loss_rows_inplace(
    rows_and_gradient: RowsAndGradient, student_NV: Tensor, inputs: CompletionLossInputs
) -> CompletionLossOutput:
    """The weighted loss of every row; afterwards `student_NV` holds the gradient of their sum.

    Args:
        rows_and_gradient: computes loss and gradient, the gradient into its last argument.
        student_NV: (..., V) logits that require grad.
        inputs: everything else, validated.

    Raises:
        ValueError: the logits' buffer is not theirs to overwrite.
    """
    _check_overwritable(student_NV, aligned_logits=inputs.aligned_NV, base_logits=inputs.base_NV)
    return CompletionLossOutput(*_InplaceRows.apply(student_NV, inputs, rows_and_gradient))


class _InplaceRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, inputs: CompletionLossInputs, rows_and_gradient: RowsAndGradient
    ) -> tuple[Tensor, ...]:
        buffer_NV = student_NV.detach()  # shares memory and version counter, but has no history to rewrite
        output = rows_and_gradient(buffer_NV, inputs, buffer_NV)
        ctx.save_for_backward(buffer_NV)
        ctx.mark_non_differentiable(*output[1:])
        return tuple(output)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        # The student's logits still refer to the buffer, but nobody may use them any more.
        return times_upstream(take_saved(ctx), 0, upstream[0], given_away=True), None, None


def _check_overwritable(student_NV: Tensor, **frozen: Tensor) -> None:
    advice = "pass inplace=False, or a copy"
    owners = (student_NV, student_NV._base)
    if any(owner is not None and owner.is_leaf and owner.requires_grad for owner in owners):
        raise ValueError(
            "inplace=True got student_logits that are a leaf which requires grad, or a view of one; overwriting a "
            f"parameter with its gradient destroys it: {advice}"
        )
    if _may_overlap(student_NV):
        raise ValueError(
            f"inplace=True got student_logits of strides {student_NV.stride()} for shape {tuple(student_NV.shape)}; "
            f"expected every entry to have its own memory (not an expanded tensor): {advice}"
        )
    for name, logits in frozen.items():
        if student_NV.numel() and student_NV.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr():
            raise ValueError(
                f"inplace=True got student_logits that share storage with {name}, which overwriting would "
                f"corrupt: {advice}"
            )


def _may_overlap(tensor: Tensor) -> bool:
    """Whether two entries may share memory: sorted by stride, a dimension must step over all smaller ones."""
    if not tensor.numel():
        return False
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= span:
            return True
        span += stride * (size - 1)
    return False

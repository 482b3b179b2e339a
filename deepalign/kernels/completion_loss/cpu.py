"""The completion loss by the compiled kernels behind the op: the CPU's, and by the same calls Triton's.

`csrc/cpu/completion_loss_math.h` has the CPU kernels' essay. They take rows that are contiguous in the vocabulary, at
any distance from each other; others are copied first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepalign.kernels.completion_loss.config import CompletionLossInputs, CompletionLossOutput
from deepalign.kernels.completion_loss.op import OP_INTO, completion_loss_with_gradient, op_arguments
from deepalign.kernels.library import dense_rows, index_rows
from deepalign.kernels.upstream import check_no_tangent


def completion_loss_rows(
    student_NV: Tensor, inputs: CompletionLossInputs, *, total: bool = False
) -> CompletionLossOutput:
    """The weighted loss of every row, or their sum; the gradient is computed along with it where it will be needed."""
    check_no_tangent("student_logits", student_NV)
    student, arguments = dense_rows(student_NV), op_arguments(_flat(inputs))
    if torch.is_grad_enabled() and student_NV.requires_grad:
        return _shaped(completion_loss_with_gradient(student, arguments, total=total), student_NV)
    return _shaped(OP_INTO(student, *arguments, None, False, total), student_NV)


def completion_loss_rows_and_gradient(
    student_NV: Tensor, inputs: CompletionLossInputs, gradient_NV: Tensor
) -> CompletionLossOutput:
    """As `completion_loss_rows`, detached, the gradient of the summed loss in `gradient_NV`."""
    student, arguments = dense_rows(student_NV), op_arguments(_flat(inputs))
    target = dense_rows(gradient_NV)
    output = OP_INTO(student, *arguments, target)
    if target.data_ptr() != gradient_NV.data_ptr():
        gradient_NV.copy_(target.view(gradient_NV.shape))
    torch.autograd.graph.increment_version(gradient_NV)
    return _shaped(output, student_NV)


def _flat(inputs: CompletionLossInputs) -> CompletionLossInputs:
    given = inputs.top_k_indices_NK
    return inputs._replace(
        aligned_NV=dense_rows(inputs.aligned_NV),
        base_NV=dense_rows(inputs.base_NV),
        kl_weight_N=inputs.kl_weight_N.flatten().contiguous(),
        completion_weight_N=inputs.completion_weight_N.flatten().contiguous(),
        top_k_indices_NK=None if given is None else index_rows(given).contiguous(),
    )


def _shaped(output: Sequence[Tensor], student_NV: Tensor) -> CompletionLossOutput:
    if student_NV.dim() != 2:
        rows = student_NV.shape[:-1]  # of every value but a total
        output = [value.view(rows + value.shape[1:]) if value.dim() else value for value in output]
    return CompletionLossOutput(*output)

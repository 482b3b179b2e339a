"""The completion loss on the CPU: compiled kernels (`csrc/cpu/completion_loss_math.h` has their essay) behind the op.

They take rows that are contiguous in the vocabulary, at any distance from each other; others are copied first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepalign.kernels.completion_loss.config import CompletionLossInputs, CompletionLossOutput
from deepalign.kernels.completion_loss.op import completion_loss_with_gradient, op_arguments
from deepalign.kernels.library import dense_rows


def completion_loss_rows(student_NV: Tensor, inputs: CompletionLossInputs) -> CompletionLossOutput:
    """The weighted loss of every row; the gradient is computed along with it where it will be needed."""
    student, arguments = dense_rows(student_NV), op_arguments(_flat(inputs))
    if torch.is_grad_enabled() and student_NV.requires_grad:
        output = completion_loss_with_gradient(student, arguments)
    else:
        output = torch.ops.deepalign.completion_loss_.default(student, *arguments, None)
    return _shaped(output, student_NV)


def completion_loss_rows_and_gradient(
    student_NV: Tensor, inputs: CompletionLossInputs, gradient_NV: Tensor
) -> CompletionLossOutput:
    """As `completion_loss_rows`, detached, the gradient of the summed loss in `gradient_NV`."""
    student, arguments = dense_rows(student_NV), op_arguments(_flat(inputs))
    target = dense_rows(gradient_NV)
    output = torch.ops.deepalign.completion_loss_.default(student, *arguments, target)
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
        top_k_indices_NK=None if given is None else given.reshape(-1, given.shape[-1]).contiguous(),
    )


def _shaped(output: Sequence[Tensor], student_NV: Tensor) -> CompletionLossOutput:
    if student_NV.dim() != 2:
        rows = student_NV.shape[:-1]
        output = [*(value.view(rows) for value in output[:-1]), output[-1].view(*rows, output[-1].shape[-1])]
    return CompletionLossOutput(*output)

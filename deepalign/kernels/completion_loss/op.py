"""The completion loss as a `torch.library` op: schema, fake kernel, autograd; kernels join it per device.

`deepalign::completion_loss` computes the gradient of the summed loss together with the loss, while the logits are in
cache; the backward only hands it on. `deepalign::completion_loss_` is the same without autograd, the gradient written
to where the caller says, which may be the student's own logits; it can reduce, too. Row weights of None are 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepalign.kernels.completion_loss.config import CompletionLossConfig, CompletionLossInputs
from deepalign.kernels.eager_math import total_of
from deepalign.kernels.library import LIBRARY, implement_on_gpu
from deepalign.kernels.upstream import first_derivative_only, take_saved, times_upstream

_INPUTS = (
    "Tensor aligned, Tensor base, Tensor? kl_weight, Tensor? completion_weight, Tensor? top_k_indices, int top_k, "
    "float teacher_mix, float temperature, float alpha_base, float gamma, float lambda_reg, bool teacher_student, "
    "bool favored_from_student, bool centered_square, SymInt vocab_size"
)
_STATISTICS = "Tensor loss, Tensor kl, Tensor completion, Tensor alpha, Tensor count, Tensor indices"

LIBRARY.define(f"completion_loss(Tensor student, {_INPUTS}, bool with_gradient) -> ({_STATISTICS}, Tensor gradient)")
# `mean`: either weight is divided by its sum over the rows (0 stays 0); `total`: the loss is the sum over rows, ().
LIBRARY.define(
    f"completion_loss_(Tensor student, {_INPUTS}, Tensor(a!)? gradient, bool mean=False, bool total=False) -> "
    f"({_STATISTICS})"
)
implement_on_gpu("completion_loss", "completion_loss", "completion_loss_")
OP_INTO = torch.ops.deepalign.completion_loss_.default


def op_arguments(inputs: CompletionLossInputs) -> tuple[Any, ...]:
    """What the ops take between the student and their last arguments, for logits (N, V)."""
    *tensors, config, vocab_size = inputs
    return (*tensors, *config_arguments(config), vocab_size)


def config_arguments(config: CompletionLossConfig) -> tuple[Any, ...]:
    """The parameters of the loss as the ops take them."""
    return (
        config.top_k,
        config.teacher_mix,
        config.temperature,
        config.alpha_base,
        config.gamma,
        config.lambda_reg,
        config.kl_direction == "teacher_student",
        config.favored_from == "student",
        config.penalty == "centered_square",
    )


def _fake_statistics(student: Tensor, top_k_indices: Tensor | None, top_k: int) -> list[Tensor]:
    rows = student.shape[0]
    k = top_k if top_k_indices is None else top_k_indices.shape[1]
    floating = [student.new_empty(rows, dtype=torch.float32) for _ in range(4)]
    return [*floating, student.new_empty(rows, dtype=torch.int64), student.new_empty(rows, k, dtype=torch.int64)]


@torch.library.register_fake("deepalign::completion_loss", lib=LIBRARY)
def _fake_new(student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    with_gradient = arguments[-1]
    gradient = student.new_empty(student.shape[0] if with_gradient else 0, student.shape[1])
    return (*_fake_statistics(student, arguments[4], arguments[5]), gradient)


@torch.library.register_fake("deepalign::completion_loss_", lib=LIBRARY)
def _fake_inplace(student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    loss, *statistics = _fake_statistics(student, arguments[4], arguments[5])
    total = arguments[17:18] == (True,)  # trailing arguments are left out where they have their defaults
    return loss.new_empty(()) if total else loss, *statistics


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1])


@first_derivative_only
def _backward(ctx: Any, loss_gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    return (times_upstream(take_saved(ctx), 0, loss_gradient), *(None,) * (len(ctx.needs_input_grad) - 1))


torch.library.register_autograd("deepalign::completion_loss", _backward, setup_context=_setup_context, lib=LIBRARY)


def completion_loss_with_gradient(student_NV: Tensor, arguments: tuple[Any, ...], *, total: bool) -> Sequence[Tensor]:
    """The op, differentiable in the student: loss (with `total` their sum), kl, completion, alpha, count, indices."""
    if not torch.compiler.is_compiling():
        return CompletionLossRows.apply(student_NV, arguments, False, total)
    loss_N, *statistics = torch.ops.deepalign.completion_loss.default(student_NV, *arguments, True)[:-1]
    return total_of(loss_N) if total else loss_N, *statistics


class CompletionLossRows(torch.autograd.Function):
    """The op with its gradient, for calls outside a compiled graph: (student, arguments, mean, total) -> its outputs.

    The op's own autograd reads the schema anew in every call: 60 us, a tenth of the time of 64 rows of 32000 entries.
    For the same reason the sum is no node of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, arguments: tuple[Any, ...], mean: bool, total: bool
    ) -> tuple[Tensor, ...]:
        gradient = torch.empty_like(student_NV, memory_format=torch.contiguous_format)
        output = OP_INTO(student_NV, *arguments, gradient, mean, total)
        _setup_context(ctx, (), (*output, gradient))
        return output

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, loss_gradient: Tensor, *unused: Tensor) -> tuple[Tensor, None, None, None]:
        return times_upstream(take_saved(ctx), 0, loss_gradient), None, None, None

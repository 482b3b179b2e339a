"""The linear completion loss as `torch.library` ops: chunks of rows from hidden states to gradients.

For every chunk of R rows, with scratch that the chunks share:

    x = h W^T in float32 for the three models, z = softcap tanh(scale x / softcap)          3 products
    the row kernel of `fused_completion_loss`: loss, statistics, G = dL/dz in z's place
    G = G scale (1 - (z/softcap)^2), times the rows' upstream gradients where they are known
    dh = G W in float32, cast once                                                          1 product
    dW += G^T h, float32 over all chunks, cast once at the end                              1 product, if W is trained

G is not rounded to half precision before the last two: `products.py` and `half_products.py` say how that is avoided.
A row whose two weights are 0 is dropped before the products; its gradient is 0.

`deepalign::linear_completion_loss` does all of it in the forward, for upstream gradient 1: dh and dW are linear in one
upstream scalar, and dh in one upstream gradient per row. dW is not linear in those, so a loss per row with a trained
head, and `recompute`, compute the loss alone in the forward, and start again in the backward, where the upstream
gradients are known: `deepalign::linear_completion_loss_backward`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepalign.kernels.checks import compute_dtype
from deepalign.kernels.completion_loss.api import IMPLEMENTATIONS, Implementation
from deepalign.kernels.completion_loss.config import CompletionLossConfig, CompletionLossInputs, CompletionLossOutput
from deepalign.kernels.half_products import HalfProducts
from deepalign.kernels.library import LIBRARY, autograd_inside_an_op
from deepalign.kernels.linear_rows import Head, logits_
from deepalign.kernels.products import product_, product_route, row_levels
from deepalign.kernels.upstream import first_derivative_only, take_saved, times_upstream

_MODELS = (
    "Tensor student_hidden, Tensor student_lm_head, Tensor aligned_hidden, Tensor aligned_lm_head, "
    "Tensor base_hidden, Tensor base_lm_head"
)
_REST = (
    "Tensor kl_weight, Tensor completion_weight, Tensor? top_k_indices, bool drop_rows, int top_k, float teacher_mix, "
    "float temperature, float alpha_base, float gamma, float lambda_reg, str kl_direction, str favored_from, "
    "str penalty, SymInt vocab_size, SymInt chunk_rows, float? logit_softcap, float logit_scale, str implementation"
)
_STATISTICS = "Tensor loss, Tensor kl, Tensor completion, Tensor alpha, Tensor count, Tensor indices"

LIBRARY.define(
    f"linear_completion_loss({_MODELS}, {_REST}, bool reduce, bool dhidden, bool dlm_head) -> "
    f"({_STATISTICS}, Tensor dhidden, Tensor dlm_head)"
)
LIBRARY.define(
    f"linear_completion_loss_backward({_MODELS}, {_REST}, Tensor upstream, bool dhidden, bool dlm_head) -> "
    "(Tensor dhidden, Tensor dlm_head)"
)


class Problem(NamedTuple):
    """What both ops are given, in the order of their schemas; hidden states (N, H), heads (V, H)."""

    student_hidden: Tensor
    student_lm_head: Tensor
    aligned_hidden: Tensor
    aligned_lm_head: Tensor
    base_hidden: Tensor
    base_lm_head: Tensor
    kl_weight: Tensor
    completion_weight: Tensor
    top_k_indices: Tensor | None
    drop_rows: bool  # whether a row's weights may both be 0: to look costs a GPU one synchronisation
    top_k: int
    teacher_mix: float
    temperature: float
    alpha_base: float
    gamma: float
    lambda_reg: float
    kl_direction: Any
    favored_from: Any
    penalty: Any
    vocab_size: int
    chunk_rows: int
    logit_softcap: float | None
    logit_scale: float
    implementation: str

    def config(self) -> CompletionLossConfig:
        return CompletionLossConfig(*self[10:19])

    def heads(self, rows: Tensor | slice) -> tuple[Head, Head, Head]:
        """The three models at some rows."""
        student, aligned, base = (
            Head(hidden[rows], lm_head[: self.vocab_size]) for hidden, lm_head in (self[0:2], self[2:4], self[4:6])
        )
        return student, aligned, base

    def chunks(self) -> Iterator[Tensor | slice]:
        """The rows of each chunk."""
        rows = self.student_hidden.shape[0]
        if not self.drop_rows:
            yield from (slice(first, min(first + self.chunk_rows, rows)) for first in range(0, rows, self.chunk_rows))
            return
        kept = ((self.kl_weight > 0) | (self.completion_weight > 0)).nonzero().squeeze(-1)
        yield from (chunk for chunk in kept.split(self.chunk_rows) if chunk.numel())


class _Scratch:
    """Logits of one chunk of three models, reused by all chunks; with a softcap the gradient has a place of its own."""

    def __init__(self, problem: Problem, dtype: torch.dtype, with_gradient: bool) -> None:
        rows = min(problem.chunk_rows, problem.student_hidden.shape[0])
        apart = with_gradient and problem.logit_softcap is not None
        self.buffers = [
            torch.empty(rows, problem.vocab_size, dtype=dtype, device=problem.student_hidden.device)
            for _ in range(4 if apart else 3)
        ]

    def first(self, rows: int) -> list[Tensor]:
        """Student's, aligned's and base's logits and where the gradient goes, `rows` of each."""
        student, aligned, base, *rest = (buffer[:rows] for buffer in self.buffers)
        return [student, aligned, base, rest[0] if rest else student]


class _Gradients:
    """dh row by row, and dW summed over chunks in float32."""

    def __init__(self, problem: Problem, dtype: torch.dtype, dhidden: bool, dlm_head: bool) -> None:
        hidden, lm_head = problem.student_hidden, problem.student_lm_head
        self.dhidden_NH = torch.zeros_like(hidden) if dhidden else hidden.new_empty(0, hidden.shape[1])
        self.sum_VH = lm_head.new_empty(lm_head.shape, dtype=dtype) if dlm_head else None
        self.is_empty = True  # the first chunk overwrites: to fill a head's gradient with zeros takes a CPU 1/4 second
        self.dtype, self.wants_dhidden, self.vocab_size = dtype, dhidden, problem.vocab_size
        self.half = None
        if product_route(lm_head.device, lm_head.dtype) == "out_dtype":
            existing = slice(problem.vocab_size)
            sum_VH = None if self.sum_VH is None else self.sum_VH[existing].zero_()
            self.half = HalfProducts(lm_head[existing], sum_VH, dhidden)

    def add(self, dlogits_RV: Tensor, student: Head, rows: Tensor | slice) -> None:
        if self.half is not None:
            dhidden_RH = self.half.add(dlogits_RV, student.hidden_NH, self.wants_dhidden)
        else:
            dhidden_RH = self._add_float32(dlogits_RV, student)
        if dhidden_RH is not None:
            self.dhidden_NH[rows] = dhidden_RH.to(self.dhidden_NH.dtype)

    def _add_float32(self, dlogits_RV: Tensor, student: Head) -> Tensor | None:
        levels = row_levels(dlogits_RV, student.lm_head_VH.dtype)
        dhidden_RH = None
        if self.wants_dhidden:
            dhidden_RH = torch.empty(student.hidden_NH.shape, dtype=self.dtype, device=dlogits_RV.device)
            product_(dlogits_RV, student.lm_head_VH, dhidden_RH, levels=levels)
        if self.sum_VH is not None:
            sum_VH = self.sum_VH[: dlogits_RV.shape[1]]
            product_(dlogits_RV.t(), student.hidden_NH, sum_VH, accumulate=not self.is_empty, levels=levels)
            self.is_empty = False
        return dhidden_RH

    def result(self, lm_head_VH: Tensor) -> tuple[Tensor, Tensor]:
        if self.sum_VH is None:
            return self.dhidden_NH, lm_head_VH.new_empty(0, lm_head_VH.shape[1])
        if self.half is None:
            self.sum_VH[0 if self.is_empty else self.vocab_size :] = 0.0
            return self.dhidden_NH, self.sum_VH.to(lm_head_VH.dtype)
        dlm_head_VH = torch.empty_like(lm_head_VH)
        dlm_head_VH[self.vocab_size :] = 0.0
        self.half.write_head_gradient(dlm_head_VH[: self.vocab_size])
        return self.dhidden_NH, dlm_head_VH


def _empty_statistics(problem: Problem) -> CompletionLossOutput:
    """Of rows that are not read."""
    hidden, given = problem.student_hidden, problem.top_k_indices
    rows, k = hidden.shape[0], problem.top_k if given is None else given.shape[1]
    loss, kl, completion, alpha = (hidden.new_zeros(rows, dtype=compute_dtype(hidden)) for _ in range(4))
    count, indices = hidden.new_zeros(rows, dtype=torch.int64), hidden.new_full((rows, k), -1, dtype=torch.int64)
    return CompletionLossOutput(loss, kl, completion, alpha, count, indices)


def _rows_of_chunk(problem: Problem, rows: Tensor | slice, aligned_RV: Tensor, base_RV: Tensor) -> CompletionLossInputs:
    given = problem.top_k_indices
    return CompletionLossInputs(
        aligned_RV,
        base_RV,
        problem.kl_weight[rows],
        problem.completion_weight[rows],
        None if given is None else given[rows],
        problem.config(),
        problem.vocab_size,
    )


def _run(
    problem: Problem, upstream_N: Tensor | None, dhidden: bool, dlm_head: bool
) -> tuple[CompletionLossOutput, Tensor, Tensor]:
    """All chunks: statistics with the loss per row, dh and dW (empty where not asked for)."""
    device, dtype = problem.student_hidden.device, compute_dtype(problem.student_hidden)
    implementation = IMPLEMENTATIONS[problem.implementation]
    assert isinstance(implementation, Implementation)
    scratch = _Scratch(problem, dtype, dhidden or dlm_head)
    statistics, gradients = _empty_statistics(problem), _Gradients(problem, dtype, dhidden, dlm_head)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for rows in problem.chunks():
            models = problem.heads(rows)
            student_RV, aligned_RV, base_RV, gradient_RV = scratch.first(models[0].hidden_NH.shape[0])
            for model, logits_RV in zip(models, (student_RV, aligned_RV, base_RV), strict=True):
                logits_(model, problem.logit_scale, problem.logit_softcap, logits_RV)
            inputs = _rows_of_chunk(problem, rows, aligned_RV, base_RV)
            if dhidden or dlm_head:
                with autograd_inside_an_op():
                    output = implementation.rows_and_gradient(student_RV, inputs, gradient_RV)
                _through_options_(problem, student_RV, gradient_RV)
                if upstream_N is not None:
                    gradient_RV.mul_(upstream_N[rows].unsqueeze(-1))
                gradients.add(gradient_RV, models[0], rows)
            else:
                output = implementation.rows(student_RV, inputs)
            for target, values in zip(statistics, output, strict=True):
                target[rows] = values
        return (statistics, *gradients.result(problem.student_lm_head))


def _through_options_(problem: Problem, student_RV: Tensor, gradient_RV: Tensor) -> None:
    """dL/dz to dL/d(h W^T), in place. With a softcap the student's logits are still there, and are used up."""
    if problem.logit_softcap is not None:
        slope_RV = student_RV.div_(problem.logit_softcap).square_().neg_().add_(1.0)
        gradient_RV.mul_(slope_RV)
    if problem.logit_scale != 1.0:
        gradient_RV.mul_(problem.logit_scale)


# ---- the ops


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, reduce, dhidden, dlm_head = arguments
    problem = Problem(*inputs)
    statistics, dhidden_NH, dlm_head_VH = _run(problem, None, dhidden, dlm_head)
    loss = statistics.loss.sum() if reduce else statistics.loss
    return (loss, *statistics[1:], dhidden_NH, dlm_head_VH)


def _again(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, upstream, dhidden, dlm_head = arguments
    problem = Problem(*inputs)
    upstream_N = upstream.expand(problem.student_hidden.shape[0])
    return _run(problem, upstream_N, dhidden, dlm_head)[1:]


LIBRARY.impl("linear_completion_loss", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_completion_loss_backward", _again, "CompositeExplicitAutograd")


@torch.library.register_fake("deepalign::linear_completion_loss", lib=LIBRARY)
def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, reduce, dhidden, dlm_head = arguments
    problem = Problem(*inputs)
    hidden, lm_head = problem.student_hidden, problem.student_lm_head
    statistics = _empty_statistics(problem)
    loss = statistics.loss.sum() if reduce else statistics.loss
    return (loss, *statistics[1:], *_fake_gradients(hidden, lm_head, dhidden, dlm_head))


@torch.library.register_fake("deepalign::linear_completion_loss_backward", lib=LIBRARY)
def _fake_again(*arguments: Any) -> tuple[Tensor, Tensor]:
    *_, dhidden, dlm_head = arguments
    return _fake_gradients(arguments[0], arguments[1], dhidden, dlm_head)


def _fake_gradients(hidden: Tensor, lm_head: Tensor, dhidden: bool, dlm_head: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if dhidden else hidden.new_empty(0, hidden.shape[1]),
        torch.empty_like(lm_head) if dlm_head else lm_head.new_empty(0, lm_head.shape[1]),
    )


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.count = len(inputs)
    *given, _, dhidden, dlm_head = inputs
    ctx.again = not (dhidden or dlm_head)
    if ctx.again:
        ctx.save_for_backward(*given[:8], *(() if given[8] is None else (given[8],)))
        ctx.rest = given[9:]
        ctx.shape = given[1].shape
    else:
        ctx.save_for_backward(output[-2], output[-1])


@first_derivative_only
def _backward(ctx: Any, upstream: Tensor | None, *unused: Tensor) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (ctx.count - 2)
    if upstream is None:
        return (None, None, *nothing)
    dhidden, dlm_head = ctx.needs_input_grad[:2]
    if not ctx.again:
        saved = take_saved(ctx)
        return (
            times_upstream(saved, 0, upstream) if dhidden else None,
            times_upstream(saved, 1, upstream) if dlm_head else None,
            *nothing,
        )
    tensors = ctx.saved_tensors
    if tensors[1].shape != ctx.shape:
        raise RuntimeError(
            f"student_lm_head had shape {tuple(ctx.shape)} in the forward and has {tuple(tensors[1].shape)} in the "
            "backward: its owner has partitioned it. Call the loss inside the forward of the module that owns the "
            "head, or use recompute=False with a reduction, which keeps no weights"
        )
    given = tensors[8] if len(tensors) > 8 else None
    results = torch.ops.deepalign.linear_completion_loss_backward(
        *tensors[:8], given, *ctx.rest, upstream, dhidden, dlm_head
    )
    return (results[0] if dhidden else None, results[1] if dlm_head else None, *nothing)


torch.library.register_autograd(
    "deepalign::linear_completion_loss", _backward, setup_context=_setup_context, lib=LIBRARY
)

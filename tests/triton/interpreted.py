"""The Triton kernels as implementations that take CPU tensors, by the name "interpreted", for the public functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deepalign.kernels import launch
from deepalign.kernels.completion_loss import api as loss_api
from deepalign.kernels.completion_loss import triton as loss_triton
from deepalign.kernels.completion_loss.config import CompletionLossInputs, CompletionLossOutput
from deepalign.kernels.completion_loss.op import op_arguments
from deepalign.kernels.contrastive_sample import api as sample_api
from deepalign.kernels.contrastive_sample import triton as sample_triton
from deepalign.kernels.contrastive_sample.op import op_arguments as sample_arguments
from deepalign.kernels.contrastive_sample.reference import ContrastiveSample, SampleOptions
from deepalign.kernels.library import dense_rows, index_rows
from deepalign.kernels.position_divergence import api as pair_api
from deepalign.kernels.position_divergence import triton as pair_triton
from deepalign.kernels.position_divergence.reference import BaseFavoredTokens, PositionDivergence


def _arguments(inputs: CompletionLossInputs) -> tuple[Any, ...]:
    given = inputs.top_k_indices_NK
    return op_arguments(
        inputs._replace(
            aligned_NV=dense_rows(inputs.aligned_NV),
            base_NV=dense_rows(inputs.base_NV),
            kl_weight_N=inputs.kl_weight_N.flatten().contiguous(),
            completion_weight_N=inputs.completion_weight_N.flatten().contiguous(),
            top_k_indices_NK=None if given is None else index_rows(given).contiguous(),
        )
    )


def _shaped(output: tuple[Tensor, ...], student: Tensor) -> CompletionLossOutput:
    rows = student.shape[:-1]
    return CompletionLossOutput(
        *(value.view(rows) for value in output[:-1]), output[-1].view(*rows, output[-1].shape[-1])
    )


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, inputs: CompletionLossInputs) -> tuple[Tensor, ...]:
        flat = dense_rows(student)
        gradient = torch.empty_like(flat, memory_format=torch.contiguous_format)
        output = loss_triton.completion_loss_(flat, *_arguments(inputs), gradient, together=False)
        loss, *statistics = _shaped(output, student)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient if bool((upstream == 1).all()) else gradient * upstream.reshape(-1, 1)
        return scaled.view(*upstream.shape, gradient.shape[-1]), None


def _rows(student: Tensor, inputs: CompletionLossInputs, *, total: bool = False) -> CompletionLossOutput:
    if torch.is_grad_enabled() and student.requires_grad:
        output = CompletionLossOutput(*_Rows.apply(student, inputs))
    else:
        arguments = _arguments(inputs)
        output = _shaped(loss_triton.completion_loss_(dense_rows(student), *arguments, None, together=False), student)
    return output._replace(loss=output.loss.sum()) if total else output


def _rows_and_gradient(student: Tensor, inputs: CompletionLossInputs, gradient: Tensor) -> CompletionLossOutput:
    target = dense_rows(gradient)
    output = loss_triton.completion_loss_(dense_rows(student), *_arguments(inputs), target, together=False)
    if target.data_ptr() != gradient.data_ptr():
        gradient.copy_(target.view(gradient.shape))
    torch.autograd.graph.increment_version(gradient)
    return _shaped(output, student)


loss_api.IMPLEMENTATIONS["interpreted"] = loss_api.Implementation(_rows, _rows_and_gradient)


@contextmanager
def sizes(operation: str, **changes: int) -> Iterator[None]:
    """Other launch sizes within: small shares split a row over several programs."""
    table = launch.LAUNCH[operation]
    before = table["default"]
    table["default"] = before._replace(**changes)
    try:
        yield
    finally:
        table["default"] = before


def _divergence_rows(aligned: Tensor, base: Tensor, top_n: int, vocab_size: int) -> PositionDivergence:
    output = pair_triton.position_divergence(dense_rows(aligned.detach()), dense_rows(base.detach()), top_n, vocab_size)
    return PositionDivergence(*(value.view(aligned.shape[:-1]) for value in output))


def _favored_rows(aligned: Tensor, base: Tensor, top_k: int, vocab_size: int) -> BaseFavoredTokens:
    pair = dense_rows(aligned.detach()), dense_rows(base.detach())
    indices, differences, count = pair_triton.favored(*pair, top_k, vocab_size, together=False)
    rows = aligned.shape[:-1]
    return BaseFavoredTokens(indices.view(*rows, top_k), differences.view(*rows, top_k), count.view(rows))


pair_api.IMPLEMENTATIONS["interpreted"] = pair_api.Implementation(_divergence_rows, _favored_rows)


def _sample_rows(aligned: Tensor, base: Tensor, uniforms: Tensor, options: SampleOptions) -> ContrastiveSample:
    sampled = sample_triton.contrastive_sample(
        dense_rows(aligned),
        dense_rows(base),
        uniforms.reshape(-1).contiguous(),
        *sample_arguments(options),
        together=False,
    )
    return ContrastiveSample(*(values.view(aligned.shape[:-1]) for values in sampled))


sample_api.IMPLEMENTATIONS["interpreted"] = _sample_rows

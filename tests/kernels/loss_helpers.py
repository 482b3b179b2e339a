"""Runs the completion loss on one case and compares every row with the float64 oracle."""

import math

import torch
from torch import Tensor

from deepalign.kernels.completion_loss import (
    IMPLEMENTATIONS,
    CompletionLossConfig,
    CompletionLossOutput,
    fused_completion_loss,
)
from tests.kernels.oracle import LossRow, loss_row

RUNNABLE = [name for name, found in IMPLEMENTATIONS.items() if not isinstance(found, str)]
# relative to the largest entry compared; bf16 and fp16 results are rounded once
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def loss_and_gradient(
    student: Tensor, aligned: Tensor, base: Tensor, upstream: Tensor | float | None = None, **options: object
) -> tuple[CompletionLossOutput, Tensor]:
    """The output and d loss / d student; `upstream` is the gradient of the loss, 1 if None."""
    leaf = student.detach().clone().requires_grad_()
    output = fused_completion_loss(leaf * 1, aligned, base, **options)
    grad_output = None if upstream is None else torch.as_tensor(upstream, dtype=output.loss.dtype)
    if grad_output is None:
        grad_output = torch.ones_like(output.loss)
    output.loss.backward(grad_output)
    return output, leaf.grad


def oracle_rows(
    student: Tensor,
    aligned: Tensor,
    base: Tensor,
    output: CompletionLossOutput,
    *,
    kl_weight: Tensor | None = None,
    completion_weight: Tensor | None = None,
    top_k_indices: Tensor | None = None,
    config: CompletionLossConfig,
    vocab_size: int | None = None,
    reduction: str = "mean",
) -> list[LossRow]:
    width = student.shape[-1]
    rows = [model.reshape(-1, width) for model in (student, aligned, base)]
    weights = []
    for weight in (kl_weight, completion_weight):
        flat = torch.ones(len(rows[0])).double() if weight is None else weight.double().reshape(-1)
        weights.append(flat / flat.sum() if reduction == "mean" and flat.sum() > 0 else flat)
    given = None if top_k_indices is None else top_k_indices.reshape(len(rows[0]), -1).tolist()
    counts = output.base_favored_count.reshape(-1).tolist()
    return [
        loss_row(
            *(model[n] for model in rows),
            float(weights[0][n]),
            float(weights[1][n]),
            None if given is None else given[n],
            config,
            width if vocab_size is None else vocab_size,
            counts[n],
        )
        for n in range(len(rows[0]))
    ]


def close(actual: Tensor, expected: list[float] | Tensor, tolerance: float, what: str, rounding: float = 0.0) -> None:
    """Compare in float64, relative to the largest finite expected magnitude; NaN must meet NaN.

    `rounding` is an absolute error to allow on top: a divergence cancels sums as large as the logits.
    """
    expected = torch.as_tensor(expected, dtype=torch.float64).reshape(actual.shape)
    finite = expected[torch.isfinite(expected)]
    scale = max(float(finite.abs().max()) if finite.numel() else 0.0, 1e-3)
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=0.0,
        atol=tolerance * scale + rounding,
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )


def check_against_oracle(
    student: Tensor, aligned: Tensor, base: Tensor, *, inplace: bool = False, implementation: str, **options: object
) -> tuple[CompletionLossOutput, Tensor]:
    """Loss, statistics and gradient of every row against float64; returns what the library gave."""
    output, gradient = loss_and_gradient(
        student, aligned, base, inplace=inplace, implementation=implementation, **options
    )
    rows = oracle_rows(student, aligned, base, output, **options)
    compute = torch.float64 if student.dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[compute]
    assert {output.loss.dtype, output.kl.dtype, output.completion.dtype, output.alpha.dtype} == {compute}
    assert (output.base_favored_count.dtype, output.top_k_indices.dtype) == (torch.int64, torch.int64)
    assert not any(tensor.requires_grad for tensor in output[1:])
    losses = [row.loss for row in rows]
    finite_logits = torch.cat([model[torch.isfinite(model)].double() for model in (student, aligned, base)])
    rounding = 8 * torch.finfo(compute).eps * float(finite_logits.abs().max()) if rows else 0.0
    reduced = losses if options.get("reduction") == "none" else [math.fsum(losses)]
    close(output.loss, reduced, tolerance, "loss", rounding * max(len(rows), 1))
    for name in ("kl", "completion", "alpha"):
        close(getattr(output, name), [getattr(row, name) for row in rows], tolerance, name, rounding)
    for row, count in zip(rows, output.base_favored_count.reshape(-1).tolist(), strict=True):
        assert row.count_bounds[0] <= count <= row.count_bounds[1]
    k = output.top_k_indices.shape[-1]
    assert output.top_k_indices.shape[:-1] == student.shape[:-1]
    assert output.top_k_indices.reshape(-1, k).tolist() == [row.indices for row in rows]
    assert gradient.dtype == student.dtype
    if rows:
        close(gradient, torch.stack([row.gradient for row in rows]), TOLERANCE[student.dtype], "gradient")
    return output, gradient

"""Runs the completion loss on one case and compares every row with the float64 oracle."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_DTYPES, COMPILED_FOR
from deepalign.kernels.completion_loss import (
    IMPLEMENTATIONS,
    CompletionLossConfig,
    CompletionLossOutput,
    fused_completion_loss,
)
from deepalign.kernels.library import WHY_NO_NATIVE
from tests.kernels.oracle import LossRow, difference_in_compute_dtype, loss_row
from tests.kernels.samples import DTYPES, largest, runnable_on_cpu

RUNNABLE = runnable_on_cpu(IMPLEMENTATIONS)
DTYPES_OF = {name: COMPILED_DTYPES if name in COMPILED_FOR else DTYPES for name in RUNNABLE}
TAKE_FLOAT64 = [name for name in RUNNABLE if torch.float64 in DTYPES_OF[name]]
every_implementation = pytest.mark.parametrize("implementation", RUNNABLE)
needs_native = pytest.mark.skipif(WHY_NO_NATIVE is not None, reason=str(WHY_NO_NATIVE))
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
    student: Tensor,
    aligned: Tensor,
    base: Tensor,
    *,
    inplace: bool = False,
    implementation: str,
    gradient_rounding: float = 0.0,
    **options: object,
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
        expected = torch.stack([row.gradient for row in rows])
        close(gradient, expected, TOLERANCE[student.dtype], "gradient", gradient_rounding)
    return output, gradient


class WideRows(NamedTuple):
    """What the loss is in float64, for many rows at once; all (N,) but the last two."""

    loss: Tensor
    kl: Tensor
    completion: Tensor
    alpha: Tensor
    fewest: Tensor  # the counts that rounding near the boundary may yield lie between these
    most: Tensor
    indices: Tensor  # (N, k)
    gradient: Tensor  # (N, V)


def wide_rows(
    student: Tensor,
    aligned: Tensor,
    base: Tensor,
    config: CompletionLossConfig,
    observed_count: Tensor,
    given: Tensor | None = None,
) -> WideRows:
    """The equations in float64 for rows (N, V) of finite entries, weights 1: the row oracle is slow for large V."""
    s, a, b = student.double(), aligned.double(), base.double()
    from_student, centered = config.favored_from == "student", config.penalty == "centered_square"
    reference, narrow_reference = (s, student) if from_student else (a, aligned)
    d = difference_in_compute_dtype(base, narrow_reference)
    threshold = b.logsumexp(-1, keepdim=True) - reference.logsumexp(-1, keepdim=True)
    slack = 2e-6 * (1 + torch.maximum(reference.abs(), b.abs()).amax(-1, keepdim=True))
    slack = torch.where((narrow_reference == base).all(-1, keepdim=True), 0.0, slack)
    fewest, most = ((d > threshold + sign * slack).sum(-1) for sign in (1, -1))
    alpha = config.alpha_base * (1 + config.gamma * observed_count.clamp(fewest, most).double() / s.shape[-1])
    indices = largest(d, config.top_k) if given is None else given
    member = torch.zeros(s.shape[0], s.shape[1] + 1, dtype=torch.bool)
    member.scatter_(1, torch.where(indices < 0, s.shape[1], indices), True)
    offset = torch.where(member[:, :-1], s - (s.mean(-1, keepdim=True) if centered else 0.0), 0.0)
    completion = config.lambda_reg * offset.square().sum(-1)
    penalty = offset - (offset.mean(-1, keepdim=True) if centered else 0.0)
    kl, kl_gradient = wide_divergence(s, config.teacher_mix * a + (1 - config.teacher_mix) * b, config)
    gradient = kl_gradient + alpha[:, None] * 2 * config.lambda_reg * penalty
    return WideRows(kl + alpha * completion, kl, completion, alpha, fewest, most, indices, gradient)


def wide_divergence(s: Tensor, t: Tensor, config: CompletionLossConfig) -> tuple[Tensor, Tensor]:
    tau = config.temperature
    log_p, log_q = (s / tau).log_softmax(-1), (t / tau).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if config.kl_direction == "teacher_student":
        return tau**2 * (q * (log_q - log_p)).sum(-1), tau * (p - q)
    raw = (p * (log_p - log_q)).sum(-1)
    return tau**2 * raw, tau * p * (log_p - log_q - raw[:, None])


def check_against_wide_rows(
    student: Tensor,
    aligned: Tensor,
    base: Tensor,
    config: CompletionLossConfig,
    given: Tensor | None = None,
    tolerance: float = 1e-6,
    gradient_rounding: float = 0.0,
    **options: object,
) -> tuple[CompletionLossOutput, Tensor]:
    """Finite rows (N, V) through the CPU kernels: |error| <= tolerance (1 + |value|), selection exact."""
    options = {"reduction": "none", "implementation": "cpu", **options}
    output, gradient = loss_and_gradient(student, aligned, base, config=config, top_k_indices=given, **options)
    expected = wide_rows(student, aligned, base, config, output.base_favored_count, given)
    for name in ("loss", "kl", "completion", "alpha"):
        actual, value = getattr(output, name).detach().double(), getattr(expected, name)
        error = ((actual - value).abs() / (1 + value.abs())).max()
        assert float(error) <= tolerance, f"{name} is off by {float(error):.2e} (1 + |value|)"
    assert torch.equal(output.top_k_indices, expected.indices)
    assert bool(((output.base_favored_count >= expected.fewest) & (output.base_favored_count <= expected.most)).all())
    close(gradient, expected.gradient, TOLERANCE[student.dtype], "gradient", gradient_rounding)
    return output, gradient


def op_call(*models: Tensor, **changes: object) -> tuple[object, ...]:
    """What both ops take for student, aligned and base logits: one more follows, `with_gradient` or `gradient`."""
    student, aligned, base = models
    rows = student.shape[0]
    arguments: dict[str, object] = {
        "student": student,
        "aligned": aligned,
        "base": base,
        "kl_weight": torch.ones(rows),
        "completion_weight": torch.ones(rows),
        "top_k_indices": None,
        "top_k": 5,
        "teacher_mix": 1.2,
        "temperature": 2.0,
        "alpha_base": 1.0,
        "gamma": 1.0,
        "lambda_reg": 0.05,
        "teacher_student": False,
        "favored_from_student": False,
        "centered_square": False,
        "vocab_size": student.shape[-1],
    }
    assert not changes.keys() - arguments.keys()
    return tuple({**arguments, **changes}.values())

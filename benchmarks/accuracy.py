"""How far a contestant is from float64, on the first rows of its case."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, three_models
from deepalign import fused_completion_loss

ROWS = 2
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def library_loss(implementation: str) -> Loss:
    """The public function as peers are called: (student, aligned, base, kl_weight, completion_weight) -> loss."""

    def loss(student: Tensor, aligned: Tensor, base: Tensor, wd_N: Tensor, wc_N: Tensor) -> Tensor:
        weights = {"kl_weight": wd_N, "completion_weight": wc_N}
        options: dict[str, Any] = {**weights, "reduction": "sum", "implementation": implementation}
        return fused_completion_loss(student, aligned, base, **options).loss

    return loss


def loss_error(case: Case, loss: Loss) -> dict[str, float]:
    """`loss`: |loss - float64| / (1 + |float64|); `gradient`: largest difference over largest entry."""
    value, gradient = _loss_and_gradient(case, loss, None)
    expected, expected_gradient = _loss_and_gradient(case, library_loss("reference"), torch.float64)
    worst = (gradient.double() - expected_gradient).abs().max() / expected_gradient.abs().max()
    return {"loss": float(abs(value - expected) / (1 + abs(expected))), "gradient": float(worst)}


def _loss_and_gradient(case: Case, loss: Loss, dtype: torch.dtype | None) -> tuple[float, Tensor]:
    student, aligned, base = (logits[:ROWS].to(dtype or logits.dtype) for logits in three_models(case))
    weights = torch.rand(2, len(student), generator=torch.Generator().manual_seed(1)).to(student.device) + 0.5
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, aligned, base, *weights.to(dtype or torch.float32))
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad


def output_error(call: Callable[[Tensor, Tensor], Sequence[Tensor]], exact: Callable[..., Any], case: Case) -> dict:
    """Outputs of an operation on two models against `exact`, which gets float64 logits: `value`, the largest
    |x - float64| / (1 + |float64|), and `entries`, how many integers differ."""
    _, aligned, base = (logits[:ROWS] for logits in three_models(case))
    found, expected = call(aligned, base), exact(aligned.double(), base.double())
    pairs = list(zip(found, expected, strict=True))
    values = [(x.double() - y).abs() / (1 + y.abs()) for x, y in pairs if x.is_floating_point()]
    entries = sum(int((x != y).sum()) for x, y in pairs if not x.is_floating_point())
    return {"value": max(float(value.max()) for value in values), "entries": entries}

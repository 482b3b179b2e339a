"""Rows scaled in place by factors that the device looks at, in the interpreter, and the backward that does so."""

import math

import pytest
import torch

from deepalign.kernels import scale_rows, upstream
from deepalign.kernels.completion_loss import CompletionLossConfig, fused_completion_loss
from deepalign.kernels.scale_rows import scale_rows_
from tests.kernels.loss_helpers import loss_and_gradient, needs_native
from tests.kernels.samples import three_models


def test_rows_are_scaled_in_place_by_factors_that_are_not_1() -> None:
    gradient = three_models(3, 3000, dtype=torch.bfloat16)[0]
    factors = torch.tensor([1.0, 2.5, math.nan])
    expected = torch.mul(gradient, factors[:, None], out=torch.empty_like(gradient))
    scaled = scale_rows_(gradient, factors)
    assert scaled.data_ptr() == gradient.data_ptr()
    # the interpreter rounds to bf16 in its own way
    torch.testing.assert_close(scaled, expected, rtol=8e-3, atol=0, equal_nan=True)
    assert torch.equal(scaled[0], expected[0])
    assert torch.equal(scale_rows_(expected[:2], torch.ones(()).expand(2)), expected[:2])


@pytest.mark.parametrize("programs", [1, 2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_any_shape_are_scaled(dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a vector, of many rows per program, of slices, and of what is not dense in the vocabulary."""
    monkeypatch.setattr(scale_rows, "MOST_PROGRAMS", programs)
    whole = three_models(2, 4, 300, dtype=dtype)[0]
    factors = torch.tensor([[1.0, 0.1, 3.0, -1.0], [0.5, 1.0, 0.0, 2.0]])
    for part in (slice(None), (slice(None), slice(3)), (0, slice(1, 3)), (1, 3)):
        expected, actual = whole.clone(), whole.clone()
        expected[part] *= factors[part].unsqueeze(-1)
        scale_rows_(actual[part], factors[part])
        assert torch.equal(actual, expected)
    assert torch.equal(scale_rows_(whole[0].t().clone().t(), factors[0]), whole[0] * factors[0].unsqueeze(-1))


@needs_native
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("by", [1.0, 3.0])
def test_a_backward_scales_its_own_buffer_on_the_device(
    by: float, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the upstream gradient is not looked at; what a kept graph has saved stays as it is."""
    monkeypatch.setattr(upstream, "is_not_waited_for", lambda _: True)
    student, aligned, base = three_models(2, 3, 300)
    leaf, factor = student.requires_grad_(), torch.tensor(by)
    options = {"config": CompletionLossConfig(top_k=5), "reduction": "sum"}
    loss = fused_completion_loss(leaf * 1, aligned, base, inplace=inplace, implementation="cpu", **options).loss
    first = torch.autograd.grad(loss, leaf, factor, retain_graph=True)[0]
    last = torch.autograd.grad(loss, leaf, factor)[0]
    _, once = loss_and_gradient(student.detach(), aligned, base, implementation="reference", **options)
    torch.testing.assert_close(last, by * once)
    assert torch.equal(first, last)

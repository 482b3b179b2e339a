"""What a GPU multiplies to get the gradients of hidden states and head, computed here: errors, ranges, bad rows."""

import math

import pytest
import torch
from torch import Tensor

from deepalign.kernels import half_products
from deepalign.kernels.completion_loss import linear_op
from deepalign.kernels.half_products import HalfProducts
from tests.kernels.linear_helpers import linear, linear_models

ROWS, VOCAB, HIDDEN = 40, 3000, 24
HALVES = [torch.bfloat16, torch.float16]


def matrices(dtype: torch.dtype, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient of logits, hidden states and a head."""
    generator = torch.Generator().manual_seed(0)
    sign = torch.randn(ROWS, VOCAB, generator=generator).sign()
    gradient = torch.randn(ROWS, VOCAB, generator=generator).mul(spread).exp() * sign * 1e-4
    hidden = (torch.randn(ROWS, HIDDEN, generator=generator) * 5).to(dtype)
    return gradient, hidden, (torch.randn(VOCAB, HIDDEN, generator=generator) / 5).to(dtype)


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


def both_gradients(gradient: Tensor, hidden: Tensor, head: Tensor, chunk: int = 16) -> tuple[Tensor, Tensor]:
    products = HalfProducts(head, torch.zeros(head.shape), dhidden=True)
    dhidden = torch.cat(
        [products.add(gradient[n : n + chunk], hidden[n : n + chunk], True) for n in range(0, len(gradient), chunk)]
    )
    dhead = torch.empty(head.shape)
    products.write_head_gradient(dhead)
    return dhidden, dhead


def exact_gradients(gradient: Tensor, hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    return gradient.double() @ head.double(), gradient.double().t() @ hidden.double()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_errors_are_an_eighth_of_those_of_bfloat16(size: float, dtype: torch.dtype) -> None:
    gradient, hidden, head = matrices(dtype)
    gradient *= size
    found = both_gradients(gradient, hidden, head)
    for one, exact, rounded in zip(
        found,
        exact_gradients(gradient, hidden, head),
        exact_gradients(gradient.bfloat16(), hidden, head),
        strict=True,
    ):
        assert rms(one - exact) <= 0.15 * rms(rounded - exact)


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_rows_of_any_size_in_any_order(order: int) -> None:
    """From 1e-20 to 1e3: every row's dh has its digits, dW those of the largest."""
    gradient, hidden, head = matrices(torch.bfloat16)
    gradient *= torch.logspace(*(-20, 3)[::order], ROWS)[:, None]
    gradient[3] = 0.0
    dhidden, dhead = both_gradients(gradient, hidden, head, chunk=4)
    exact_dhidden, exact_dhead = exact_gradients(gradient, hidden, head)
    for row in range(ROWS):
        assert rms(dhidden[row] - exact_dhidden[row]) <= 6e-4 * rms(exact_dhidden[row])
    assert rms(dhead - exact_dhead) <= 6e-4 * rms(exact_dhead)


def test_hidden_states_and_heads_of_any_size() -> None:
    for by in (1e-6, 1e5):
        gradient, hidden, head = matrices(torch.bfloat16)
        hidden, head = hidden * by, head * by
        for one, exact in zip(
            both_gradients(gradient, hidden, head), exact_gradients(gradient, hidden, head), strict=True
        ):
            assert rms(one - exact) <= 3e-4 * rms(exact)


def test_a_bad_row_spoils_its_own_hidden_state() -> None:
    gradient, hidden, head = matrices(torch.bfloat16)
    gradient[5, 7] = math.nan
    dhidden, dhead = both_gradients(gradient, hidden, head)
    assert dhidden.isnan().all(-1).nonzero().flatten().tolist() == [5]
    assert bool(dhead.isnan().any())


def test_nothing_but_zeros() -> None:
    gradient, hidden, head = matrices(torch.bfloat16)
    for one in both_gradients(gradient * 0, hidden, head):
        assert not bool(one.any())


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_linear_loss_with_them(dtype: torch.dtype, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op as on a GPU, its products with a float32 result aside."""
    models = linear_models(21, dtype=dtype).trained(head=trained)
    options = {"chunk_rows": 8, "vocab_size": 290, "logit_scale": 0.5}
    _, expected = linear(models, **options)
    used = []
    monkeypatch.setattr(linear_op, "product_route", lambda *_: "out_dtype")
    monkeypatch.setattr(half_products, "scale_sum_", lambda total, by: used.append(total.mul_(by)))
    _, found = linear(models, **options)
    assert bool(used) == trained
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=1.6e-2 if dtype == torch.bfloat16 else 4e-3, atol=1e-5)

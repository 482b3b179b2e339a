"""Plain calls of the completion loss, which go to the op at once: the same results as the long way, the same errors."""

import math

import pytest
import torch
from torch import Tensor

from deepalign import CompletionLossConfig, fused_completion_loss
from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.completion_loss import api
from deepalign.kernels.completion_loss.op import OP_INTO
from tests.kernels.loss_helpers import needs_native, op_call
from tests.kernels.samples import three_models

pytestmark = needs_native
CONFIG = CompletionLossConfig(top_k=5, lambda_reg=0.05)
WEIGHTS = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([0.0, 0.0, 0.3])


def both_ways(monkeypatch: pytest.MonkeyPatch, *models: Tensor, **options: object) -> list[tuple[Tensor, ...]]:
    """Output and gradient of a call that the op takes at once, and of the same by the checks and single operations."""
    results = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(api, "_at_once", lambda *arguments: None)
        student = models[0].detach().requires_grad_()
        output = fused_completion_loss(student, *models[1:], config=CONFIG, **options)
        output.loss.sum().backward()
        with torch.no_grad():
            alone = fused_completion_loss(student, *models[1:], config=CONFIG, **options)
        results.append((*output, student.grad, *alone))
    return results


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", [(None, None), WEIGHTS, (None, WEIGHTS[1]), (torch.zeros(3), torch.zeros(3))])
def test_the_same_as_the_long_way(
    weights: tuple[Tensor | None, Tensor | None], reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kl_weight": weights[0], "completion_weight": weights[1], "reduction": reduction, "vocab_size": 90}
    short, long = both_ways(monkeypatch, *three_models(3, 97, dtype=dtype), **options)
    for left, right in zip(short, long, strict=True):
        torch.testing.assert_close(
            left.detach(), right.detach(), rtol=1e-6 if left.dtype == torch.float32 else 0.01, atol=1e-6
        )


def test_plain_calls_do_not_look_at_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "check_logits", None)
    student, aligned, base = three_models(3, 40)
    weights = {"kl_weight": WEIGHTS[0], "completion_weight": WEIGHTS[1]}
    for leaf in (student, student.requires_grad_(), torch.nn.Parameter(student.detach())):
        for given in ({}, weights):
            fused_completion_loss(leaf, aligned, base, config=CONFIG, **given)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["kl_weight", "completion_weight"])
def test_weights_out_of_range_are_refused(name: str, weight: float) -> None:
    models, weights = three_models(3, 40), torch.tensor([1.0, weight, 1.0])
    with pytest.raises(ValueError, match=f"{name} has a negative, NaN or infinite entry"):
        fused_completion_loss(*models, config=CONFIG, **{name: weights})
    with pytest.raises(RuntimeError, match=f"{name} must be finite and not negative"):
        OP_INTO(*op_call(*models, **{name: weights}), None)


S, A, B = three_models(3, 40)
REFUSED: dict[str, tuple[tuple[object, ...], dict[str, object], str]] = {
    "another dtype": ((S, A, B.bfloat16()), {}, "base_logits is torch.bfloat16"),
    "another shape": ((S, A[:2], B), {}, "aligned_logits has shape"),
    "not a tensor": ((S, A, B.tolist()), {}, "base_logits is a list"),
    "weights too few": ((S, A, B), {"kl_weight": torch.ones(2)}, "kl_weight has shape"),
    "top_k beyond the vocabulary": ((S, A, B), {"config": CompletionLossConfig(top_k=41)}, "top_k is 41"),
    "vocab_size beyond the width": ((S, A, B), {"vocab_size": 41}, "vocab_size is 41"),
    "vocab_size a bool": ((S, A, B), {"vocab_size": True}, "vocab_size is True"),
    "reduction": ((S, A, B), {"reduction": "average"}, "reduction is 'average'"),
    "config": ((S, A, B), {"config": None}, "config is a NoneType"),
}


@pytest.mark.parametrize(("models", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_said_by_the_checks(
    models: tuple[object, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fused_completion_loss(*models, **{"config": CONFIG, **options})


def test_a_strided_vocabulary_takes_the_long_way() -> None:
    models = three_models(3, 40)
    strided = [model.t().contiguous().t() for model in models]
    expected = fused_completion_loss(*models, config=CONFIG)
    for left, right in zip(fused_completion_loss(*strided, config=CONFIG), expected, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("total", [False, True])
def test_opcheck_of_the_reducing_op(mean: bool, total: bool) -> None:
    models = three_models(2, 37)
    arguments = op_call(*models, kl_weight=None, completion_weight=torch.tensor([0.0, 3.0]))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for gradient in (None, torch.empty(2, 37)):
        torch.library.opcheck(OP_INTO, (*arguments, gradient, mean, total), test_utils=tests)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_is_refused(inplace: bool) -> None:
    student, aligned, base = three_models(3, 40)
    student.requires_grad_()
    for upstream in (None, torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)):
        loss = fused_completion_loss(student * 1, aligned, base, config=CONFIG, inplace=inplace).loss
        (gradient,) = torch.autograd.grad(loss, student, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            (gradient.square().sum() + student.sum()).backward()

"""`deepalign::completion_loss` as a `torch.library` op: opcheck, the compiler, autograd, calls that it must refuse."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.completion_loss import CompletionLossConfig, fused_completion_loss
from tests.kernels.loss_helpers import loss_and_gradient, needs_native, op_call
from tests.kernels.samples import Case, pairwise, three_models

pytestmark = needs_native
CONFIG = CompletionLossConfig(top_k=5, lambda_reg=0.05)
OPTIONS = {"config": CONFIG, "implementation": "cpu"}
GIVEN = torch.tensor([[3, 3, -1], [0, 29, 1]])
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "given": {"top_k_indices": GIVEN},
    "padded": {"vocab_size": 30},
    "other options": {"teacher_student": True, "favored_from_student": True, "centered_square": True},
}


OPCHECKED = pairwise({"variant": tuple(VARIANTS), "dtype": COMPILED_DTYPES, "with_gradient": (False, True)})


@pytest.mark.parametrize("case", OPCHECKED, ids=lambda case: "-".join(map(str, case.values())))
def test_opcheck(case: Case) -> None:
    variant, dtype, with_gradient = case.values()
    student, aligned, base = three_models(2, 37, dtype=dtype)
    arguments = op_call(student.requires_grad_(with_gradient), aligned, base, **VARIANTS[variant])
    torch.library.opcheck(torch.ops.deepalign.completion_loss.default, (*arguments, with_gradient))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_opcheck_in_place(changes: dict[str, object]) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    models = three_models(2, 37)
    for gradient in (None, torch.empty(2, 37)):
        arguments = (*op_call(*models, **changes), gradient)
        torch.library.opcheck(torch.ops.deepalign.completion_loss_.default, arguments, test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_forward_and_backward(dynamic: bool, reduction: str) -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def loss(student: Tensor, aligned: Tensor, base: Tensor) -> Tensor:
        output = fused_completion_loss(2 * student, aligned, base, reduction=reduction, **OPTIONS)
        return (output.loss * 3.0).sum() + output.loss.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    seen = []
    for rows, vocab in ((3, 60), (4, 61), (7, 90)):
        student, aligned, base = three_models(rows, vocab)
        results = []
        for function in (loss, compiled):
            leaf = student.clone().requires_grad_()
            value = function(leaf, aligned, base)
            value.backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1])
        seen.append(graphs)
    # one graph serves all shapes, or each shape has its own
    assert len(set(seen)) == (1 if dynamic else 3)


def test_what_has_no_gradient_gets_none_from_an_infinite_factor_when_compiled() -> None:
    student, aligned, base = three_models(3, 60)
    weight = torch.tensor([1.0, 0.0, 2.0])

    def loss(leaf: Tensor) -> Tensor:
        return fused_completion_loss(
            leaf, aligned, base, kl_weight=weight, completion_weight=weight, reduction="none", **OPTIONS
        ).loss

    leaf = student.requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf).backward(torch.tensor([1.0, math.inf, 2.0]))
    assert not bool(leaf.grad[1].any())
    assert bool(leaf.grad.isfinite().all())


def test_compiled_by_inductor() -> None:
    student, aligned, base = three_models(3, 60)
    compiled = torch.compile(lambda s: fused_completion_loss(s * 1, aligned, base, **OPTIONS).loss, fullgraph=True)
    leaf = student.requires_grad_()
    compiled(leaf).backward()
    _, expected = loss_and_gradient(student, aligned, base, **OPTIONS)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_accumulate_over_a_retained_graph(inplace: bool) -> None:
    """Autograd may adopt what the backward returns as `leaf.grad` and add into it: what is saved must not change."""
    student, aligned, base = three_models(3, 40)
    _, expected = loss_and_gradient(student, aligned, base, **OPTIONS)
    leaf = student.requires_grad_()
    logits = leaf.clone() if inplace else leaf
    loss = fused_completion_loss(logits, aligned, base, inplace=inplace, **OPTIONS).loss
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad, times * expected)
    leaf.grad.zero_()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", [0.0, -2.5, math.nan])
def test_upstream_gradients(upstream: float, inplace: bool) -> None:
    student, aligned, base = three_models(3, 40)
    _, once = loss_and_gradient(student, aligned, base, **OPTIONS)
    _, scaled = loss_and_gradient(student, aligned, base, upstream=upstream, inplace=inplace, **OPTIONS)
    torch.testing.assert_close(scaled, upstream * once, equal_nan=True)
    _, rows = loss_and_gradient(student, aligned, base, reduction="none", **OPTIONS)
    each = torch.tensor([1.0, 1.0, upstream])
    _, scaled = loss_and_gradient(student, aligned, base, upstream=each, reduction="none", inplace=inplace, **OPTIONS)
    torch.testing.assert_close(scaled, each[:, None] * rows, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_backward_without_retaining_the_graph_fails(inplace: bool) -> None:
    student, aligned, base = three_models(2, 40)
    loss = fused_completion_loss(student.requires_grad_() * 1, aligned, base, inplace=inplace, **OPTIONS).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_the_in_place_form_raises_the_version_counter() -> None:
    student, aligned, base = three_models(2, 40)
    logits = student.requires_grad_() * 1
    before = logits._version
    fused_completion_loss(logits, aligned, base, inplace=True, **OPTIONS)
    assert logits._version > before


def test_the_op_without_gradient_has_no_backward() -> None:
    student, aligned, base = three_models(2, 40)
    loss = torch.ops.deepalign.completion_loss(*op_call(student.requires_grad_(), aligned, base), False)[0]
    with pytest.raises(RuntimeError):
        loss.sum().backward()
    assert student.grad is None


def test_forward_only_allocates_no_gradient() -> None:
    models = three_models(2, 40)
    gradient = torch.ops.deepalign.completion_loss(*op_call(*models), False)[-1]
    assert gradient.shape == (0, 40)


S, A, B = three_models(2, 40)
ROWS = torch.ones(2)
REFUSED: dict[str, dict[str, object]] = {
    "float64": {"student": S.double(), "aligned": A.double(), "base": B.double()},
    "int": {"student": S.int(), "aligned": A.int(), "base": B.int()},
    "two dtypes": {"base": B.bfloat16()},
    "one dimension": {"student": S[0], "aligned": A[0], "base": B[0]},
    "three dimensions": {"student": S[None], "aligned": A[None], "base": B[None]},
    "fewer rows": {"aligned": A[:1]},
    "narrower": {"base": B[:, :39]},
    "teacher of one dimension": {"aligned": A[0]},
    "strided vocabulary of the student": {"student": S.t().contiguous().t()},
    "strided vocabulary of a teacher": {"base": B.t().contiguous().t()},
    "weights too few": {"kl_weight": ROWS[:1]},
    "weights too many": {"completion_weight": torch.ones(3)},
    "weights float64": {"kl_weight": ROWS.double()},
    "weights int": {"completion_weight": ROWS.int()},
    "weights strided": {"kl_weight": torch.ones(4)[::2]},
    "top_k 0": {"top_k": 0},
    "top_k negative": {"top_k": -1},
    "top_k beyond the vocabulary": {"top_k": 31, "vocab_size": 30},
    "vocab_size 0": {"vocab_size": 0},
    "vocab_size negative": {"vocab_size": -4},
    "vocab_size beyond the width": {"vocab_size": 41},
    "given int32": {"top_k_indices": torch.zeros(2, 3, dtype=torch.int32)},
    "given of fewer rows": {"top_k_indices": torch.zeros(1, 3, dtype=torch.int64)},
    "given of more rows": {"top_k_indices": torch.zeros(3, 3, dtype=torch.int64)},
    "given of one dimension": {"top_k_indices": torch.zeros(2, dtype=torch.int64)},
    "given of three dimensions": {"top_k_indices": torch.zeros(2, 3, 2, dtype=torch.int64)},
    "given strided": {"top_k_indices": torch.zeros(3, 2, dtype=torch.int64).t()},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_direct_calls_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    arguments = op_call(S, A, B, **changes)
    for with_gradient in (False, True):
        with pytest.raises(RuntimeError):
            torch.ops.deepalign.completion_loss(*arguments, with_gradient)
    for gradient in (None, torch.empty(2, 40)):
        with pytest.raises(RuntimeError):
            torch.ops.deepalign.completion_loss_(*arguments, gradient)


GRADIENTS = {
    "fewer rows": torch.empty(1, 40),
    "narrower": torch.empty(2, 39),
    "one dimension": torch.empty(80),
    "another dtype": torch.empty(2, 40, dtype=torch.bfloat16),
    "strided vocabulary": torch.empty(40, 2).t(),
}


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_that_do_not_fit_are_refused(gradient: Tensor) -> None:
    with pytest.raises(RuntimeError, match="gradient"):
        torch.ops.deepalign.completion_loss_(*op_call(S, A, B), gradient)


def test_direct_calls_skip_given_entries_that_do_not_exist() -> None:
    """The op alone cannot trust them: a GPU's caller does not look at the values."""
    wild = torch.tensor([[3, 40, 2**40], [-2, -(2**60), 3]])
    sane = torch.tensor([[3, -1, -1], [-1, -1, 3]])
    results = [
        torch.ops.deepalign.completion_loss(*op_call(S, A, B, top_k_indices=indices), True) for indices in (wild, sane)
    ]
    for position in (0, 1, 2, 3, 4, 6):
        assert torch.equal(results[0][position], results[1][position])


@pytest.mark.parametrize("columns", [0, 300])
def test_direct_calls_with_no_or_many_given_entries(columns: int) -> None:
    given = torch.arange(40).repeat(8)[:columns].expand(2, columns).contiguous()
    output = torch.ops.deepalign.completion_loss(*op_call(S, A, B, top_k_indices=given), True)
    expected = 0.05 * S.square().sum(-1) if columns else torch.zeros(2)
    torch.testing.assert_close(output[2], expected)
    assert output[5].shape == (2, columns)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e-300, 1e300])
@pytest.mark.parametrize("name", ["temperature", "teacher_mix", "alpha_base", "gamma", "lambda_reg"])
def test_direct_calls_with_odd_numbers_stay_in_bounds(name: str, value: float) -> None:
    output = torch.ops.deepalign.completion_loss(*op_call(S, A, B, **{name: value}), True)
    assert bool(((output[5] >= -1) & (output[5] < 40)).all())
    assert bool(((output[4] >= 0) & (output[4] <= 40)).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_direct_calls_with_odd_weights_stay_in_bounds(value: float) -> None:
    weight = torch.tensor([value, 1.0])
    output = torch.ops.deepalign.completion_loss(*op_call(S, A, B, kl_weight=weight), True)
    sound = torch.ops.deepalign.completion_loss(*op_call(S, A, B), True)
    assert all(torch.equal(left[1], right[1]) for left, right in zip(output, sound, strict=True))

"""The completion loss under autograd and torch.compile: upstream gradients, retained graphs, the in-place form."""

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepalign.kernels import checks
from deepalign.kernels.completion_loss import CompletionLossConfig, fused_completion_loss
from tests.kernels.loss_helpers import TAKE_FLOAT64, every_implementation, loss_and_gradient
from tests.kernels.samples import three_models

CONFIG = CompletionLossConfig(top_k=5, lambda_reg=0.05)
KINDS = [
    {"kl_direction": direction, "favored_from": favored_from, "penalty": penalty}
    for direction, favored_from, penalty in itertools.product(
        ("student_teacher", "teacher_student"), ("aligned", "student"), ("square", "centered_square")
    )
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("implementation", TAKE_FLOAT64)
def test_gradcheck(implementation: str, kind: dict[str, str]) -> None:
    student, aligned, base = three_models(3, 9, dtype=torch.float64, peaked=False)
    student[0, 2] = aligned[0, 2] = base[0, 2] = -torch.inf
    weight = torch.tensor([1.0, 2.0, 0.0])
    present = torch.isfinite(student)

    def loss(values: Tensor) -> Tensor:
        return fused_completion_loss(
            torch.where(present, values, -torch.inf),
            aligned,
            base,
            kl_weight=weight,
            completion_weight=weight,
            config=CompletionLossConfig(top_k=3, lambda_reg=0.1, **kind),
            reduction="none",
            implementation=implementation,
        ).loss

    assert torch.autograd.gradcheck(loss, torch.where(present, student, 0.0).requires_grad_())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_implementation
def test_upstream_gradients_scale(implementation: str, dtype: torch.dtype, inplace: bool) -> None:
    models = three_models(3, 40, dtype=dtype)
    options = {"config": CONFIG, "implementation": implementation}
    tolerance = {"rtol": 3 * torch.finfo(dtype).eps, "atol": 1e-6}
    _, once = loss_and_gradient(*models, **options)
    _, tripled = loss_and_gradient(*models, upstream=3.0, inplace=inplace, **options)
    torch.testing.assert_close(tripled, 3 * once, **tolerance)

    upstream = torch.tensor([3.0, 1.0, -0.5])
    _, rows = loss_and_gradient(*models, reduction="none", **options)
    _, scaled = loss_and_gradient(*models, upstream=upstream, inplace=inplace, reduction="none", **options)
    torch.testing.assert_close(scaled, (upstream[:, None] * rows.float()).to(dtype), **tolerance)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("inplace", [False, True])
@every_implementation
def test_a_retained_graph_gives_the_same_gradient_twice(implementation: str, inplace: bool, upstream: float) -> None:
    student, aligned, base = three_models(3, 40)
    leaf = student.requires_grad_()
    loss = fused_completion_loss(
        leaf * 1, aligned, base, config=CONFIG, inplace=inplace, implementation=implementation
    ).loss
    gradients = [torch.autograd.grad(upstream * loss, leaf, retain_graph=True)[0].clone() for _ in range(3)]
    assert bool(gradients[0].any())
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("infinite", [float("inf"), float("nan")])
@every_implementation
def test_what_has_no_gradient_gets_none_from_an_infinite_factor(implementation: str, infinite: float) -> None:
    """A row that is not read, and padding: as where a loss per row is divided by weights of which one is 0."""
    student, aligned, base = three_models(3, 30)
    weight = torch.tensor([1.0, 0.0, 2.0])
    options = {"kl_weight": weight, "completion_weight": weight, "vocab_size": 25, "reduction": "none"}
    upstream = torch.tensor([1.0, infinite, infinite])
    _, gradient = loss_and_gradient(
        student, aligned, base, config=CONFIG, implementation=implementation, upstream=upstream, **options
    )
    assert not bool(gradient[1].any())
    assert not bool(gradient[:, 25:].any())
    assert bool(gradient[0, :25].isfinite().all())
    assert not bool(gradient[2, :25].isfinite().any())


@every_implementation
def test_no_gradient_flows_to_the_frozen_models_or_the_weights(implementation: str) -> None:
    student, aligned, base = (model.requires_grad_() for model in three_models(2, 30))
    weight = torch.ones(2, requires_grad=True)
    output = fused_completion_loss(
        student, aligned, base, kl_weight=weight, config=CONFIG, implementation=implementation
    )
    output.loss.backward()
    assert student.grad is not None
    assert (aligned.grad, base.grad, weight.grad) == (None, None, None)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_implementation
def test_what_is_not_trained_may_be_made_in_inference_mode(implementation: str, reduction: str) -> None:
    student, aligned, base = three_models(3, 40)
    weight, given = torch.tensor([1.0, 0.0, 2.0]), torch.arange(6).view(3, 2)
    with torch.inference_mode():
        made = [tensor.clone() for tensor in (aligned, base, weight, given)]
    gradients = []
    for a, b, weight_N, given_NK in (made, (aligned, base, weight, given)):
        _, gradient = loss_and_gradient(
            student, a, b, kl_weight=weight_N, completion_weight=weight_N, top_k_indices=given_NK, reduction=reduction,
            config=CONFIG, implementation=implementation,
        )  # fmt: skip
        gradients.append(gradient)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_implementation
def test_inplace_leaves_the_gradient_in_the_logits(implementation: str, dtype: torch.dtype) -> None:
    student, aligned, base = three_models(2, 3, 40, dtype=dtype)
    expected_output, expected = loss_and_gradient(student, aligned, base, config=CONFIG, implementation=implementation)
    leaf = student.requires_grad_()
    logits = leaf * 1
    output = fused_completion_loss(logits, aligned, base, config=CONFIG, inplace=True, implementation=implementation)
    assert torch.equal(logits.detach(), expected)
    output.loss.backward()
    assert torch.equal(leaf.grad, expected)
    for left, right in zip(output, expected_output, strict=True):
        torch.testing.assert_close(left, right)
        assert left.requires_grad == right.requires_grad


@every_implementation
def test_inplace_takes_no_rows_of_any_strides(implementation: str) -> None:
    leaf = torch.zeros(2, 0, 1, requires_grad=True)
    logits = (leaf * 1).as_strided((2, 0, 1), (0, 1, 0))  # as torch makes them of an expanded operand
    others = torch.zeros(2, 2, 0, 1)
    config = CompletionLossConfig(top_k=1)
    fused_completion_loss(logits, *others, config=config, inplace=True, implementation=implementation).loss.backward()
    assert leaf.grad is not None


@every_implementation
def test_inplace_on_a_slice_writes_only_there(implementation: str) -> None:
    student, aligned, base = three_models(2, 4, 40)
    leaf = student.requires_grad_()
    logits = leaf * 1
    shifted = fused_completion_loss(
        logits[:, :-1], aligned[:, :-1], base[:, :-1], config=CONFIG, inplace=True, implementation=implementation
    )
    assert torch.equal(logits[:, -1], leaf[:, -1])
    shifted.loss.backward()
    _, expected = loss_and_gradient(
        leaf[:, :-1], aligned[:, :-1], base[:, :-1], config=CONFIG, implementation=implementation
    )
    assert torch.equal(leaf.grad[:, :-1], expected)
    assert not bool(leaf.grad[:, -1].any())


@every_implementation
def test_inplace_does_nothing_without_a_gradient(implementation: str) -> None:
    student, aligned, base = three_models(2, 40)
    copy = student.clone()
    fused_completion_loss(student, aligned, base, config=CONFIG, inplace=True, implementation=implementation)
    with torch.no_grad():
        trainable = student.clone().requires_grad_()
        fused_completion_loss(trainable, aligned, base, config=CONFIG, inplace=True, implementation=implementation)
    assert torch.equal(student, copy)
    assert torch.equal(trainable, copy)


@every_implementation
def test_an_earlier_operation_that_saved_the_logits_fails_loudly(implementation: str) -> None:
    student, aligned, base = three_models(2, 40)
    logits = student.requires_grad_() * 1
    saved = logits.square().sum()
    loss = fused_completion_loss(logits, aligned, base, config=CONFIG, inplace=True, implementation=implementation).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + saved).backward()


@every_implementation
def test_a_logits_buffer_written_to_between_forward_and_backward_fails_loudly(implementation: str) -> None:
    student, aligned, base = three_models(2, 40)
    logits = student.requires_grad_() * 1
    loss = fused_completion_loss(logits, aligned, base, config=CONFIG, inplace=True, implementation=implementation).loss
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ALIASING: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda leaf: leaf.clone(),
    "view of a clone": lambda leaf: leaf.unsqueeze(0).clone().squeeze(0),
    "sum with another use": lambda leaf: leaf + 0,
}


@pytest.mark.parametrize("to_logits", ALIASING.values(), ids=ALIASING)
@every_implementation
def test_inplace_gradients_accumulate(implementation: str, to_logits: Callable[[Tensor], Tensor]) -> None:
    """Autograd may adopt the buffer as `leaf.grad` and add into it; the sum must be right for all that."""
    student, aligned, base = three_models(2, 40)
    _, expected = loss_and_gradient(student, aligned, base, config=CONFIG, implementation=implementation)
    leaf = student.requires_grad_()
    loss = fused_completion_loss(
        to_logits(leaf), aligned, base, config=CONFIG, inplace=True, implementation=implementation
    ).loss
    (loss + leaf.sum()).backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, expected + 1)
    leaf.grad = None
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad, times * expected)


def misuse_leaf(student: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return student.requires_grad_(), aligned, base


def misuse_view_of_leaf(student: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return student.requires_grad_()[:, :30], aligned[:, :30], base[:, :30]


def misuse_view_made_a_leaf(student: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return student[:, :30].requires_grad_(), aligned[:, :30], base[:, :30]


def misuse_expanded(student: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (student.requires_grad_()[:1] * 1).expand(2, 40), aligned, base


def misuse_overlapping(student: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (student.requires_grad_() * 1).as_strided((2, 40), (20, 1)), aligned, base


def misuse_shared_with_aligned(student: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = student.requires_grad_() * 1
    return logits, logits, base


def misuse_shared_with_base(student: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.cat([student.requires_grad_(), base])
    return logits[:2], aligned, logits[2:].detach()


MISUSES = {
    misuse_leaf: "leaf which requires grad",
    misuse_view_of_leaf: "leaf which requires grad",
    misuse_view_made_a_leaf: "leaf which requires grad",
    misuse_expanded: "its own memory",
    misuse_overlapping: "its own memory",
    misuse_shared_with_aligned: "share storage with aligned_logits",
    misuse_shared_with_base: "share storage with base_logits",
}


@pytest.mark.parametrize(("misuse", "message"), MISUSES.items(), ids=lambda item: getattr(item, "__name__", ""))
@every_implementation
def test_inplace_misuse_is_refused(implementation: str, misuse: Callable[..., tuple], message: str) -> None:
    models = misuse(*three_models(2, 40))
    before = models[0].detach().clone()
    with pytest.raises(ValueError, match=message):
        fused_completion_loss(*models, config=CONFIG, inplace=True, implementation=implementation)
    assert torch.equal(models[0].detach(), before)


@every_implementation
def test_compiles_without_a_graph_break_and_in_silence(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_reference_announced", False)
    student, aligned, base = three_models(3, 60)
    given = torch.tensor([[3, 3, -1]]).expand(3, 3)
    weight = torch.tensor([1.0, 0.0, 2.0])

    def loss(s: Tensor, selection: Tensor | None, name: str | None) -> Tensor:
        return fused_completion_loss(
            s, aligned, base, kl_weight=weight, top_k_indices=selection, config=CONFIG, implementation=name
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = student.requires_grad_()
    for selection, name in ((None, None), (given, implementation)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = compiled(leaf, selection, name)
        expected = loss(leaf, selection, implementation)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, leaf), torch.autograd.grad(expected, leaf))


@every_implementation
def test_inplace_refuses_to_compile(implementation: str) -> None:
    """The compiler would lose the write behind autograd's back."""
    student, aligned, base = three_models(2, 40)
    leaf = student.requires_grad_()

    @torch.compile(fullgraph=True, backend="eager")
    def loss() -> Tensor:
        return fused_completion_loss(
            leaf * 1, aligned, base, config=CONFIG, inplace=True, implementation=implementation
        ).loss

    with pytest.raises(torch._dynamo.exc.Unsupported, match="completion_loss_rows_inplace"):
        loss()


def test_inplace_is_refused_by_a_compilation_of_one_graph() -> None:
    models = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0)).unbind()
    logits = models[0].requires_grad_()

    def loss(inplace: bool) -> Tensor:
        return fused_completion_loss(
            logits * 1, *models[1:], config=CompletionLossConfig(top_k=3), inplace=inplace
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(False), loss(False))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="inplace"):
        compiled(True)

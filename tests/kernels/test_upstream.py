"""What a backward makes of a gradient computed before: nobody waits for a GPU, and nobody's tensor is written to.

The route that a GPU takes is run on CPU tensors here, the look at the upstream gradient forbidden.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from deepalign.kernels import upstream
from deepalign.kernels.completion_loss import CompletionLossConfig, fused_completion_loss, fused_linear_completion_loss
from deepalign.kernels.library import WHY_NO_NATIVE
from deepalign.kernels.upstream import is_alone, take_saved
from tests.kernels.linear_helpers import linear_models, materialised
from tests.kernels.loss_helpers import every_implementation, loss_and_gradient, needs_native
from tests.kernels.samples import three_models

NativeLoss = Callable[..., tuple[Tensor, Tensor, list[int]]]
CONFIG = CompletionLossConfig(top_k=5, lambda_reg=0.05)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Tensor) -> bool:
        raise AssertionError("the upstream gradient was looked at")

    monkeypatch.setattr(upstream, "is_not_waited_for", lambda _: True)
    monkeypatch.setattr(upstream, "_is_one", refuse)
    monkeypatch.setattr(upstream, "WHY_NO_TRITON", "tensors are on a CPU")


@pytest.fixture
def native_loss(as_on_a_gpu: None) -> NativeLoss:
    """Makes a leaf, its loss, and a list of where what the graph saves lies."""

    def make(inplace: bool = False, **options: Any) -> tuple[Tensor, Tensor, list[int]]:
        student, aligned, base = three_models(3, 40)
        leaf, where = student.requires_grad_(), []

        def note(saved: Tensor) -> Tensor:
            where.append(saved.data_ptr())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            loss = fused_completion_loss(
                leaf * 1, aligned, base, config=CONFIG, inplace=inplace, implementation="cpu", **options
            ).loss
        return leaf, loss, where

    return make


class Handing(torch.autograd.Function):
    """Hands on a saved tensor, and says whether it was alone."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, found: list[bool]) -> Tensor:
        ctx.save_for_backward(torch.ones_like(leaf))
        ctx.found = found
        return leaf.sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        saved = take_saved(ctx)
        ctx.found.append(is_alone(saved, 0))
        return saved[0], None


def view_of(loss: Tensor) -> Tensor:
    return loss.grad_fn.saved_tensors[0][0]


def detached(loss: Tensor) -> Tensor:
    return loss.grad_fn.saved_tensors[0].detach()


def itself(loss: Tensor) -> Tensor:
    return loss.grad_fn.saved_tensors[0]


def its_memory(loss: Tensor) -> object:
    return loss.grad_fn.saved_tensors[0].untyped_storage()


@pytest.mark.parametrize("hold", [view_of, detached, itself, its_memory])
def test_a_saved_tensor_is_alone_unless_somebody_holds_it(hold: Callable[[Tensor], object]) -> None:
    found: list[bool] = []
    leaf = torch.randn(3, requires_grad=True)
    loss = Handing.apply(leaf, found)
    loss.backward(retain_graph=True)
    held = hold(loss)
    loss.backward(retain_graph=True)
    loss.backward()
    del held
    Handing.apply(leaf, found).backward()
    assert found == [False, False, False, True]


@needs_native
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("by", [1.0, 3.0])
def test_a_graph_that_is_not_kept_hands_on_its_own_buffer(
    native_loss: NativeLoss, by: float, inplace: bool, reduction: str
) -> None:
    leaf, loss, where = native_loss(inplace, reduction=reduction)
    factor = torch.full_like(loss, by)
    (gradient,) = torch.autograd.grad(loss, loss_logits(loss), factor)
    assert gradient.data_ptr() in where  # neither allocated nor copied
    _, once = loss_and_gradient(*three_models(3, 40), config=CONFIG, implementation="reference", reduction=reduction)
    torch.testing.assert_close(gradient, by * once)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf, factor)


def loss_logits(loss: Tensor) -> Any:
    """The edge from the loss's own node to its logits."""
    node = loss.grad_fn
    while "Rows" not in node.name():
        node = node.next_functions[0][0]
    return torch.autograd.graph.GradientEdge(*node.next_functions[0])


@needs_native
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("by", [1.0, 3.0])
def test_what_a_kept_graph_has_saved_is_never_written_to(native_loss: NativeLoss, by: float, inplace: bool) -> None:
    _, loss, where = native_loss(inplace)
    logits, factor = loss_logits(loss), torch.tensor(by)
    gradients = [torch.autograd.grad(loss, logits, factor, retain_graph=True)[0] for _ in range(3)]
    assert not {gradient.data_ptr() for gradient in gradients} & set(where)
    (last,) = torch.autograd.grad(loss, logits, factor)
    for gradient in gradients:
        assert torch.equal(gradient, last)


@needs_native
def test_a_buffer_that_somebody_holds_is_copied(
    native_loss: NativeLoss,
) -> None:
    _, loss, _ = native_loss()
    logits = loss_logits(loss)
    (held,) = loss.grad_fn.saved_tensors
    before = held.clone()
    (gradient,) = torch.autograd.grad(loss, logits, torch.tensor(3.0))
    assert torch.equal(held, before)
    assert torch.equal(gradient, 3 * before)


@needs_native
@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_gradient_that_the_op_returns_is_the_callers() -> None:
    student, aligned, base = three_models(3, 40)
    ones = torch.ones(3)
    output = torch.ops.deepalign.completion_loss(
        student.requires_grad_(), aligned, base, ones, ones, None, 5, 1.2, 2.0, 1.0, 1.0, 1e-3, False, False, False, 40,
        True,
    )  # fmt: skip
    before = output[-1].clone()
    output[0].sum().mul(3.0).backward()
    assert torch.equal(output[-1], before)
    assert torch.equal(student.grad, 3 * before)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("keep", [False, True])
@every_implementation
def test_the_linear_loss_scales_both_gradients(implementation: str, keep: bool) -> None:
    models = linear_models(5).trained()
    _, once = materialised(models, reduction="sum", config=CONFIG)
    loss = fused_linear_completion_loss(*models, config=CONFIG, reduction="sum", implementation=implementation).loss
    for times in (1, 2) if keep else (1,):
        loss.backward(torch.tensor(3.0), retain_graph=keep)
        for leaf, gradient in zip(models.leaves(), once, strict=True):
            torch.testing.assert_close(leaf.grad.double(), times * 3 * gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_with_the_upstream_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    gradient, by = torch.randn(4, 50).to(dtype), torch.tensor(1 / 3)
    scaled = upstream.times_upstream([gradient], 0, by)
    assert torch.equal(scaled, (gradient.float() * by).to(dtype))
    rows = torch.tensor([1 / 3, 1.0, 0.7, -2.0])
    assert torch.equal(upstream.times_upstream([gradient], 0, rows), (gradient.float() * rows.unsqueeze(-1)).to(dtype))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_batch_of_upstream_gradients(recompute: bool) -> None:
    """`is_grads_batched`, of a vectorised jacobian."""
    models, (student, aligned, base) = linear_models(3).trained(), three_models(3, 40)
    per_row: dict[str, Any] = {"config": CONFIG, "reduction": "none"}
    linear_loss = fused_linear_completion_loss(*models, **per_row, recompute=recompute).loss
    loss = fused_completion_loss(student.requires_grad_(), aligned, base, **per_row).loss
    for rows, leaves in ((linear_loss, models.leaves()), (loss, [student])):
        batched = torch.autograd.grad(rows, leaves, torch.eye(3), is_grads_batched=True, retain_graph=True)
        for one in range(3):
            alone = torch.autograd.grad(rows[one], leaves, retain_graph=True)
            for gradients, gradient in zip(batched, alone, strict=True):
                torch.testing.assert_close(gradients[one], gradient)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # what torch's forward mode imports
def test_forward_mode_is_refused() -> None:
    """Without a gradient required, too, where no autograd function is there to refuse it."""
    models, logits = linear_models(3), three_models(3, 40)
    with forward_ad.dual_level():
        for name in ("student_hidden", "student_lm_head"):
            given = getattr(models, name)
            dual = models._replace(**{name: forward_ad.make_dual(given, given)})
            with pytest.raises(RuntimeError, match=f"{name} has a tangent"):
                fused_linear_completion_loss(*dual, config=CONFIG)
        for shape in ((3, 40), (1, 3, 40)) if WHY_NO_NATIVE is None else ():
            student, aligned, base = (tensor.view(shape) for tensor in logits)
            with pytest.raises(RuntimeError, match="student_logits has a tangent"):
                fused_completion_loss(forward_ad.make_dual(student, student), aligned, base, config=CONFIG)

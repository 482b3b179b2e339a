"""The linear loss under autograd, autocast and torch.compile."""

import pytest
import torch
from torch import Tensor

from deepalign.kernels.checks import storable
from deepalign.kernels.completion_loss import fused_linear_completion_loss
from deepalign.kernels.library import WHY_NO_NATIVE
from tests.kernels.linear_helpers import CONFIG, Models, largest_error, linear, linear_models, materialised
from tests.kernels.loss_helpers import every_implementation

WAYS = [
    pytest.param(reduction, recompute, id=f"{reduction}-{'again' if recompute else 'kept'}")
    for reduction in ("sum", "none")
    for recompute in (False, True)
]
every_way = pytest.mark.parametrize(("reduction", "recompute"), WAYS)


@pytest.mark.parametrize("softcap", [None, 2.0])
@every_way
def test_gradcheck(reduction: str, recompute: bool, softcap: float | None) -> None:
    models = linear_models(4, vocab=9, sizes=(3, 5, 4), dtype=torch.float64, spread=1.0).trained()
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5])
    # M must not change under the probe's steps
    given = torch.tensor([[0, 3, -1], [1, 2, 8], [0, 1, 2], [4, 4, 5]])

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return fused_linear_completion_loss(
            hidden,
            head,
            *models[2:],
            kl_weight=weight,
            completion_weight=weight,
            top_k_indices=given,
            config=CONFIG,
            reduction=reduction,
            recompute=recompute,
            chunk_rows=2,
            logit_softcap=softcap,
            logit_scale=0.8,
        ).loss

    assert torch.autograd.gradcheck(loss, tuple(models.leaves()))


@pytest.mark.parametrize("upstream", [1.0, 3.0])
@every_way
@every_implementation
def test_a_retained_graph_gives_the_same_gradient_every_time(
    implementation: str, reduction: str, recompute: bool, upstream: float
) -> None:
    """On leaves: autograd adopts a gradient as .grad and adds the next one into it, which must not be the saved one."""
    models = linear_models(5).trained()
    output = fused_linear_completion_loss(
        *models, config=CONFIG, reduction=reduction, recompute=recompute, implementation=implementation
    )
    once = [gradient.clone() for gradient in backward_into_leaves(output.loss, models, upstream)]
    for times in (2, 3, 4):
        summed = backward_into_leaves(output.loss, models, upstream)
        for gradient, first in zip(summed, once, strict=True):
            assert bool(first.any())
            torch.testing.assert_close(gradient, times * first, rtol=1e-6, atol=1e-7)


def backward_into_leaves(loss: Tensor, models: Models, upstream: float) -> list[Tensor]:
    loss.backward(torch.full_like(loss, upstream), retain_graph=True)
    return [leaf.grad for leaf in models.leaves()]


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
@every_implementation
def test_every_row_has_its_upstream_gradient(implementation: str, recompute: bool, head: bool) -> None:
    models = linear_models(9).trained(head)
    upstream = torch.tensor([3.0, 1.0, -0.5, 0.0, 2.0, 1.0, -4.0, 0.25, 1.5])
    options = {"reduction": "none", "upstream": upstream}
    _, gradients = linear(models, recompute=recompute, chunk_rows=4, implementation=implementation, **options)
    _, expected = materialised(models, **options)
    for gradient, wanted in zip(gradients, expected, strict=False):
        assert largest_error(gradient, wanted) <= 1e-5


def test_the_upstream_gradient_is_expanded_from_a_mean_of_rows() -> None:
    models = linear_models(6).trained()
    output = fused_linear_completion_loss(*models, config=CONFIG, reduction="none")
    gradients = torch.autograd.grad(output.loss.mean(), models.leaves())
    for gradient, wanted in zip(gradients, materialised(models, reduction="none", upstream=1 / 6)[1], strict=True):
        assert largest_error(gradient, wanted) <= 1e-5


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_flows_to_the_frozen_models(recompute: bool) -> None:
    models = Models(*(tensor.requires_grad_() for tensor in linear_models(3)))
    output = fused_linear_completion_loss(*models, config=CONFIG, recompute=recompute)
    assert not any(statistic.requires_grad for statistic in output[1:])
    output.loss.backward()
    assert [tensor.grad is not None for tensor in models] == [True, True, False, False, False, False]


@every_way
def test_all_but_what_is_trained_may_be_made_in_inference_mode(reduction: str, recompute: bool) -> None:
    models, weight, given = linear_models(5), torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0]), torch.arange(10).view(5, 2)
    with torch.inference_mode():
        made = Models(*models[:2], *(tensor.clone() for tensor in models[2:])), weight.clone(), given.clone()
    results = []
    for frozen, weight_N, given_NK in (made, (models, weight, given)):
        trained = frozen.trained()
        fused_linear_completion_loss(
            *trained,
            kl_weight=weight_N,
            completion_weight=weight_N,
            top_k_indices=given_NK,
            config=CONFIG,
            reduction=reduction,
            recompute=recompute,
        ).loss.sum().backward()
        results.append([leaf.grad for leaf in trained.leaves()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_frozen_head_made_in_inference_mode_is_not_copied() -> None:
    models = linear_models(5)
    with torch.inference_mode():
        head = models.student_lm_head.clone()
    assert storable(head).data_ptr() != head.data_ptr() == storable(head, copy=False).data_ptr()
    hidden = models.student_hidden.clone().requires_grad_()
    fused_linear_completion_loss(hidden, head, *models[2:], config=CONFIG, recompute=True).loss.backward()
    wanted = materialised(models.trained(head=False))[1][0]
    assert hidden.grad is not None
    assert largest_error(hidden.grad, wanted) <= 1e-5


def test_a_head_alone_may_be_trained() -> None:
    models = linear_models(4)
    models = models._replace(student_lm_head=models.student_lm_head.clone().requires_grad_())
    _, (dlm_head,) = linear(models)
    assert largest_error(dlm_head, materialised(models)[1][1]) <= 1e-5


def test_no_gradient_no_graph() -> None:
    models = linear_models(3).trained()
    with torch.no_grad():
        assert not fused_linear_completion_loss(*models, config=CONFIG).loss.requires_grad
    assert not fused_linear_completion_loss(*linear_models(3), config=CONFIG).loss.requires_grad


@every_way
def test_a_tied_embedding_gets_both_gradients(reduction: str, recompute: bool) -> None:
    """The head is the embedding too: hidden = f(embedding), logits = hidden embedding^T."""
    models = linear_models(6, vocab=80)
    tokens = torch.tensor([3, 1, 4, 1, 5, 9])

    def gradient(embedding: Tensor, through: object) -> Tensor:
        hidden = torch.tanh(embedding[tokens])
        loss = through(hidden, embedding).sum()
        return torch.autograd.grad(loss, embedding)[0]

    def ours(hidden: Tensor, head: Tensor) -> Tensor:
        return fused_linear_completion_loss(
            hidden, head, *models[2:], config=CONFIG, reduction=reduction, recompute=recompute
        ).loss

    actual = gradient(models.student_lm_head.clone().requires_grad_(), ours)
    wide = models.student_lm_head.double().requires_grad_()
    hidden = torch.tanh(wide[tokens])
    _, (dhidden, dhead) = materialised(models._replace(student_hidden=hidden), reduction=reduction)
    assert largest_error(actual, dhead + torch.autograd.grad(hidden, wide, dhidden)[0]) <= 1e-5


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_is_that_of_a_linear_layer(recompute: bool) -> None:
    """float32 parameters under bfloat16 autocast: as if all had been cast, the gradients float32 again."""
    models = linear_models(6).trained()
    with torch.autocast("cpu", torch.bfloat16):
        output, gradients = linear(models, recompute=recompute)
    cast = Models(*(tensor.detach().bfloat16() for tensor in models)).trained()
    expected, expected_gradients = linear(cast, recompute=recompute)
    for one, other in zip(output, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, other.float())


def test_autocast_leaves_mixed_dtypes_and_float64_alone() -> None:
    models = linear_models(4)
    mixed = models._replace(student_hidden=models.student_hidden.bfloat16()).trained()
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(torch.isfinite(linear(mixed)[0].loss))
        wide = linear_models(4, dtype=torch.float64).trained()
        assert largest_error(linear(wide)[1][0], materialised(wide)[1][0]) <= 1e-12


@every_way
def test_a_second_derivative_is_refused(reduction: str, recompute: bool) -> None:
    models = linear_models(4).trained()
    loss = fused_linear_completion_loss(*models, config=CONFIG, reduction=reduction, recompute=recompute).loss
    gradients = torch.autograd.grad(3.0 * loss.sum(), tuple(models.leaves()), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.square().sum().backward(retain_graph=True)


def test_backward_without_values() -> None:
    models = Models(*(tensor.to("meta") for tensor in linear_models(4))).trained()
    fused_linear_completion_loss(*models, config=CONFIG, implementation="reference").loss.backward()
    assert [leaf.grad.shape for leaf in models.leaves()] == [leaf.shape for leaf in models.leaves()]


@every_way
def test_compiles_without_a_graph_break(reduction: str, recompute: bool) -> None:
    models = linear_models(5).trained()
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return fused_linear_completion_loss(
            hidden * 2.0,
            head,
            *models[2:],
            kl_weight=weight,
            completion_weight=weight,
            config=CONFIG,
            reduction=reduction,
            recompute=recompute,
        ).loss.sum()

    expected = loss(*models.leaves())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = compiled(*models.leaves())
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * actual, models.leaves()), torch.autograd.grad(3 * expected, models.leaves())
    )


@pytest.mark.parametrize("name", ["kept", "per row", "again", "float64"])
def test_opcheck(name: str) -> None:
    dtype = torch.float64 if name == "float64" else torch.float32
    models = linear_models(5, vocab=60, dtype=dtype if name == "float64" else torch.bfloat16)
    models = models.trained(head=name != "per row")
    implementation = "reference" if WHY_NO_NATIVE or name == "float64" else "cpu"
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0], dtype=dtype)
    rest = (7, 1.2, 2.0, 1.0, 1.0, 0.05, "student_teacher", "aligned", "square", 60, 2, None, 1.0, implementation)
    given = (*models, weight, weight, None, True, *rest)
    gradients = name != "again"
    op = torch.ops.deepalign.linear_completion_loss.default
    torch.library.opcheck(op, (*given, name != "per row", gradients, gradients and name != "per row"))
    detached = [tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in given]
    backward = torch.ops.deepalign.linear_completion_loss_backward.default
    torch.library.opcheck(backward, (*detached, torch.ones(5, dtype=dtype), True, True))

"""The peers compute what the reference computes: a comparison of speed with anything else would mean nothing."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks import peers
from deepalign import (
    CompletionLossOutput,
    base_favored_tokens,
    contrastive_sample,
    fused_completion_loss,
    position_divergence,
)
from tests.kernels.samples import three_models

ROWS, VOCAB = 5, 700
LOSS_PEERS = ("eager", "eager_tuned", "compile", "compile_tuned")


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def distinct_differences(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Peaked logits whose 100 largest differences do not tie at the end, where `torch.topk` would choose freely."""
    for seed in range(100):
        student, aligned, base = three_models(ROWS, VOCAB, dtype=dtype, seed=seed)
        top_NK = (base.float() - aligned.float()).topk(101, dim=-1).values
        if bool((top_NK[:, 99] > top_NK[:, 100]).all()):
            return student, aligned, base
    raise AssertionError("every seed ties at the boundary")


def loss_and_gradient(name: str, student: Tensor, *others: Tensor) -> tuple[CompletionLossOutput, Tensor]:
    leaf = student.clone().requires_grad_()
    if name == "reference":
        aligned, base, wd_N, wc_N = others
        weights = {"kl_weight": wd_N, "completion_weight": wc_N}
        output = fused_completion_loss(leaf, aligned, base, **weights, reduction="sum", implementation="reference")
    else:
        output = peers.loss_peers()[name](leaf, *others)
    output.loss.backward()
    assert leaf.grad is not None
    return output, leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSS_PEERS)
def test_loss(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "BLOCK_ELEMENTS", 2 * VOCAB)  # three blocks, the last one short
    weights = torch.rand(2, ROWS, generator=torch.Generator().manual_seed(0)) + 0.5
    inputs = (*distinct_differences(dtype), *weights)
    originals = [tensor.clone() for tensor in inputs]
    expected, expected_gradient = loss_and_gradient("reference", *inputs)
    output, gradient = loss_and_gradient(name, *inputs)
    assert_close(output.loss, expected.loss, rtol=2e-6, atol=0)
    # In float64: the reference's own rounding depends on the instruction set that torch uses.
    exact, _ = loss_and_gradient("reference", *(tensor.double() for tensor in inputs))
    for statistic in ("kl", "completion", "alpha"):
        assert_close(getattr(output, statistic), getattr(exact, statistic).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(output.base_favored_count, expected.base_favored_count)
    # one rounding to the logits' dtype apart, at most
    assert_close(gradient, expected_gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(output.top_k_indices.sort().values, expected.top_k_indices.sort().values)
    for tensor, original in zip(inputs, originals, strict=True):
        assert torch.equal(tensor, original), "a peer wrote to its input"


@pytest.mark.parametrize("name", LOSS_PEERS[:2])
def test_loss_forward_only_is_the_same_and_scaled_gradients_scale(name: str) -> None:
    weights = torch.rand(2, ROWS, generator=torch.Generator().manual_seed(0))
    inputs = (*distinct_differences(torch.float32), *weights)
    expected, expected_gradient = loss_and_gradient(name, *inputs)
    with torch.no_grad():
        for value, wanted in zip(peers.loss_peers()[name](*inputs), expected, strict=True):
            assert_close(value, wanted.detach(), rtol=0, atol=0)
    leaf = inputs[0].clone().requires_grad_()
    (3.0 * peers.loss_peers()[name](leaf, *inputs[1:]).loss).backward()
    assert_close(leaf.grad, 3.0 * expected_gradient)


ALL_FILTERS = {"top_k": 20, "top_p": 0.8, "min_p": 0.05}
FILTERS: list[dict[str, float]] = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}, ALL_FILTERS]
SAMPLERS = [(name, filters) for name in ("eager", "eager_tuned") for filters in FILTERS]
SAMPLERS += [("compile", {}), ("compile", ALL_FILTERS)]  # compiling takes seconds


@pytest.mark.parametrize(("name", "filters"), SAMPLERS, ids=str)
def test_sampler(name: str, filters: dict[str, float]) -> None:
    _, aligned, base = three_models(300, VOCAB, dtype=torch.float32, seed=1)
    uniforms = torch.rand(300, generator=torch.Generator().manual_seed(3))
    options = {"alpha": 0.7, "temperature": 1.3, **filters}
    expected = contrastive_sample(aligned, base, uniforms=uniforms, implementation="reference", **options)
    with torch.no_grad():
        sample = peers.sampler_peers()[name](aligned, base, uniforms, **options)
    same_N = sample.token_ids == expected.token_ids
    assert same_N.float().mean() > 0.98  # but for uniforms within rounding of a boundary
    assert_close(sample.logprobs[same_N], expected.logprobs[same_N], rtol=1e-4, atol=1e-4)
    assert len(expected.token_ids.unique()) > 50, "the case is too peaked to tell samplers apart"


@pytest.mark.parametrize("name", ["eager", "compile"])
def test_base_favored_tokens(name: str) -> None:
    _, aligned, base = distinct_differences(torch.float32)
    expected = base_favored_tokens(aligned, base, implementation="reference")
    with torch.no_grad():
        found = peers.pair_peers("base_favored_tokens")[name](aligned, base)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.differences, expected.differences)
    assert torch.equal(found.count, expected.count)


@pytest.mark.parametrize("name", ["eager", "compile"])
def test_position_divergence(name: str) -> None:
    _, aligned, base = distinct_differences(torch.float32)
    expected = position_divergence(aligned, base, implementation="reference")
    with torch.no_grad():
        found = peers.pair_peers("position_divergence")[name](aligned, base)
    for statistic, value, wanted in zip(expected._fields, found, expected, strict=True):
        assert_close(value, wanted, rtol=1e-4, atol=1e-6, msg=partial("{}: {}".format, statistic))

"""The Triton kernels where they are meant to run: against the reference at real sizes, beyond 2^31 entries, no
waits."""

import pytest
import torch
from torch import Tensor

from deepalign import (
    CompletionLossConfig,
    base_favored_tokens,
    contrastive_sample,
    fused_completion_loss,
    fused_linear_completion_loss,
)
from deepalign.kernels.position_divergence import position_divergence
from tests.kernels.linear_helpers import Models, linear_models
from tests.kernels.samples import Case, pairwise, three_models

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(models: list[Tensor], implementation: str, **options: object) -> tuple[list[Tensor], Tensor]:
    student, aligned, base = (model.cuda() for model in models)
    leaf = student.requires_grad_()
    output = fused_completion_loss(leaf * 1, aligned, base, reduction="none", implementation=implementation, **options)
    output.loss.sum().backward()
    return [value.detach() for value in output], leaf.grad


# Every combination compiles kernels of its own, for seconds: every pair of values occurs in one.
LOSS_CASES = pairwise(
    {
        "shape": ((1, 7), (3, 32000), (40, 128256), (7, 128255), (7, 128257), (33, 151936)),
        "dtype": DTYPES,
        "kind": (None, "kl_direction teacher_student", "favored_from student", "penalty centered_square"),
    }
)


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_loss_and_gradient_are_the_references(case: Case) -> None:
    (rows, vocab), dtype, kind = case.values()
    models = three_models(rows, vocab, dtype=dtype)
    config = CompletionLossConfig(top_k=min(100, vocab), **(dict([kind.split()]) if kind else {}))
    for inplace in (False, True):
        found, gradient = run(models, "triton", config=config, inplace=inplace)
        expected, expected_gradient = run(models, "reference", config=config)
        for left, right in zip(found[:4], expected[:4], strict=True):
            torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-5)
        assert bool(((found[4] - expected[4]).abs() <= 2).all())
        assert torch.equal(found[5], expected[5])
        error = (gradient.float() - expected_gradient.float()).abs().max()
        assert float(error) <= (8e-3 if dtype != torch.float32 else 2e-5) * float(expected_gradient.abs().max()) + 1e-7


def test_the_same_twice_to_the_bit() -> None:
    models = three_models(300, 128256, dtype=torch.bfloat16)
    (first, gradient), (second, again) = run(models, "triton"), run(models, "triton")
    assert torch.equal(gradient, again)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_more_than_2_to_the_31_entries() -> None:
    rows, vocab = 17000, 128256
    assert rows * vocab > 2**31
    student = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    aligned, base = student + 0.5, student * 0.9
    output = fused_completion_loss(student, aligned, base, reduction="none", implementation="triton")
    last = [model[-3:].float().contiguous() for model in (student, aligned, base)]
    expected = fused_completion_loss(*last, reduction="none", implementation="reference")
    torch.testing.assert_close(output.kl[-3:], expected.kl, rtol=2e-5, atol=2e-5)
    assert torch.equal(output.top_k_indices[-3:], expected.top_k_indices)
    student.requires_grad_()
    loss = fused_completion_loss(
        student * 1, aligned, base, reduction="sum", inplace=True, implementation="triton"
    ).loss
    loss.backward()
    assert bool(torch.isfinite(student.grad[-3:]).all())
    assert bool(student.grad[-3:].any())


def test_ties_bad_and_absent_rows() -> None:
    models = three_models(6, 32000, dtype=torch.bfloat16)
    models[2][0] = models[1][0]
    models[0][1, 7] = torch.nan
    for model in models:
        model[2, 100:20000] = -torch.inf
    found, gradient = run(models, "triton")
    expected, _ = run(models, "reference")
    assert torch.equal(found[5], expected[5])
    assert gradient.isnan().any(-1).tolist() == [False, True, False, False, False, False]


def test_no_wait_for_the_device() -> None:
    """Not in a backward either, whatever the upstream gradient is."""
    student, aligned, base = (model.cuda() for model in three_models(64, 32000, dtype=torch.bfloat16))
    student.requires_grad_()
    weight = torch.ones(64, device="cuda")
    uniforms = torch.rand(64, device="cuda", dtype=torch.float64)
    options = {"kl_weight": weight, "completion_weight": weight, "implementation": "triton"}
    models = Models(*(tensor.cuda() for tensor in linear_models(64, vocab=4096, dtype=torch.bfloat16))).trained()

    def step() -> None:
        for inplace in (False, True):
            loss = fused_completion_loss(student * 1, aligned, base, inplace=inplace, **options).loss
            (3 * loss).backward(retain_graph=True)
            loss.backward()
        fused_linear_completion_loss(*models, reduction="sum", implementation="triton").loss.backward()
        contrastive_sample(aligned, base, alpha=0.5, top_k=50, top_p=0.9, uniforms=uniforms, implementation="triton")
        base_favored_tokens(aligned, base, implementation="triton")

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("by", [1.0, 3.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_capture_into_a_graph(inplace: bool, by: float) -> None:
    """Loss, gradient, statistics and draws, captured once and replayed on other logits."""
    models = [model.cuda() for model in three_models(9, 32000, dtype=torch.bfloat16)]
    others = [model.cuda() for model in three_models(9, 32000, dtype=torch.bfloat16, seed=5)]
    student, aligned, base = (model.clone() for model in models)
    student.requires_grad_()
    uniforms = torch.rand(9, device="cuda", dtype=torch.float64)
    ones = torch.ones(9, device="cuda")
    options = {"kl_weight": ones, "completion_weight": ones, "implementation": "triton"}

    def step() -> list[Tensor]:
        output = fused_completion_loss(student * 1, aligned, base, reduction="sum", inplace=inplace, **options)
        drawn = contrastive_sample(aligned, base, alpha=0.5, top_p=0.9, uniforms=uniforms, implementation="triton")
        found = position_divergence(aligned, base, implementation="triton")
        gradient = torch.autograd.grad(by * output.loss, student)
        return [*(value.detach() for value in output), *drawn, *found, *gradient]

    step()  # compiles
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor, other in zip((student, aligned, base), others, strict=True):
            tensor.copy_(other)
    graph.replay()
    for left, right in zip(captured, step(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_ops_are_what_they_say() -> None:
    """`opcheck` with the Triton kernels: schemas, fake kernels, autograd."""
    models = [model.cuda() for model in three_models(3, 300, dtype=torch.bfloat16)]
    ones = torch.ones(3, device="cuda")
    rest = (ones, ones, None, 5, 1.2, 2.0, 1.0, 1.0, 1e-3, False, False, False, 300)
    student = models[0].clone().requires_grad_()
    torch.library.opcheck(torch.ops.deepalign.completion_loss.default, (student, *models[1:], *rest, True))
    torch.library.opcheck(
        torch.ops.deepalign.completion_loss_.default, (*models, *rest, torch.empty_like(models[0])),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.deepalign.position_divergence.default, (*models[1:], 5, 300))
    torch.library.opcheck(torch.ops.deepalign.base_favored_tokens.default, (*models[1:], 5, 300))
    uniforms = torch.rand(3, device="cuda", dtype=torch.float64)
    arguments = (*models[1:], uniforms, 0.5, 1.0, 5, 0.9, 0.0, False, 300)
    torch.library.opcheck(torch.ops.deepalign.contrastive_sample.default, arguments)


SAMPLER_CASES = pairwise({"rows": (1, 16, 300), "vocab": (100, 32000, 128256), "dtype": DTYPES})


@pytest.mark.parametrize("case", SAMPLER_CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_sampler_and_statistics_are_the_references(case: Case) -> None:
    rows, vocab, dtype = case.values()
    _, aligned, base = (model.cuda() for model in three_models(rows, vocab, dtype=dtype))
    for left, right in zip(
        position_divergence(aligned, base, implementation="triton"),
        position_divergence(aligned, base, implementation="reference"),
        strict=True,
    ):
        torch.testing.assert_close(
            left.float(), right.float(), rtol=2e-5, atol=3.0 if left.dtype == torch.int64 else 2e-5
        )
    uniforms = torch.rand(rows, device="cuda", dtype=torch.float64)
    filters = ({}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"top_p": 0.999}, {"min_p": 0.01}, {"temperature": 0.0})
    for chosen in filters:
        options = {"alpha": 0.5, "uniforms": uniforms, **chosen}
        found, expected = (
            contrastive_sample(aligned, base, implementation=i, **options) for i in ("triton", "reference")
        )
        # a uniform may fall on a boundary
        assert int((found.token_ids != expected.token_ids).sum()) <= 1 + rows // 100


def test_a_top_is_whole_in_itself() -> None:
    """A product with the rounded reciprocal, the fast division, is 0.99999994 for 41 of 41, and for seven others."""
    logits = torch.randn(1, 300, device="cuda")
    for top_n in range(1, 101):
        assert position_divergence(logits, logits, top_n=top_n, implementation="triton").top_overlap.item() == 1.0


def requested(which: str) -> int:
    """Bytes asked for, without what the allocator adds to round them: up to a MiB for a large tensor."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]


@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_memory_and_a_retained_graph(upstream: float) -> None:
    student, aligned, base = (torch.randn(512, 128256, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    student.requires_grad_()
    fused_completion_loss(student, aligned, base, reduction="sum", implementation="triton").loss.backward()
    student.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested("current")
    loss = fused_completion_loss(student, aligned, base, reduction="sum", implementation="triton").loss
    assert requested("peak") - before <= 1.02 * student.nbytes
    by = torch.tensor(upstream, device="cuda")
    first = torch.autograd.grad(loss, student, by, retain_graph=True)[0]
    kept = first.clone()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested("current")
    second = torch.autograd.grad(loss, student, by)[0]
    assert requested("peak") - before <= 0.01 * student.nbytes  # the graph's own buffer
    assert torch.equal(first, kept)  # what was handed out is not scaled again
    assert torch.equal(second, kept)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one() -> None:
    models = [model.to("cuda:1") for model in three_models(3, 300)]
    leaf = models[0].requires_grad_()
    config = CompletionLossConfig(top_k=5)
    output = fused_completion_loss(leaf, *models[1:], config=config, implementation="triton")
    (2.0 * output.loss).backward()
    assert torch.cuda.current_device() == 0
    expected = fused_completion_loss(*(model.cpu() for model in models), config=config, implementation="reference")
    torch.testing.assert_close(output.loss.cpu(), expected.loss, rtol=2e-5, atol=2e-5)
    assert bool(leaf.grad.isfinite().all())

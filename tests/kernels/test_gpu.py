"""What only a GPU can show: the same numbers as on the CPU, and no synchronisation with the host."""

import pytest
import torch

from deepalign import CompletionLossConfig, base_favored_tokens, fused_completion_loss, position_divergence
from deepalign.kernels.completion_loss import IMPLEMENTATIONS
from tests.kernels.linear_helpers import Models, linear, linear_models, materialised

pytestmark = pytest.mark.gpu


@pytest.fixture
def logits() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 4001, generator=generator, dtype=torch.float64) * 4 for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_the_cpu(logits: list[torch.Tensor], dtype: torch.dtype) -> None:
    results = []
    for device in ("cpu", "cuda"):
        student, aligned, base = (tensor.to(dtype).to(device) for tensor in logits)
        student.requires_grad_()
        output = fused_completion_loss(student, aligned, base, config=CompletionLossConfig(top_k=50))
        output.loss.backward()
        results.append([tensor.detach().cpu() for tensor in (*output, student.grad)])
    *statistics, gradients = zip(*results, strict=True)
    for on_cpu, on_gpu in statistics:
        torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-5, atol=1e-6)
    # the last place of a bfloat16: another kernel may round it the other way
    torch.testing.assert_close(*gradients, rtol=8e-3 if dtype == torch.bfloat16 else 2e-5, atol=1e-6)


def test_diagnosis_is_that_of_the_cpu(logits: list[torch.Tensor]) -> None:
    _, aligned, base = logits
    for operation in (base_favored_tokens, position_divergence):
        for on_gpu, on_cpu in zip(operation(aligned.cuda(), base.cuda()), operation(aligned, base), strict=True):
            torch.testing.assert_close(on_gpu.cpu(), on_cpu)


def test_neither_forward_nor_backward_waits_for_the_device(logits: list[torch.Tensor]) -> None:
    student, aligned, base = (tensor.float().cuda() for tensor in logits)
    student.requires_grad_()
    weight = torch.ones(5, device="cuda")

    def step() -> None:
        loss = fused_completion_loss(student, aligned, base, kl_weight=weight, completion_weight=weight).loss
        (2 * loss).backward(retain_graph=True)
        loss.backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_gradients_err_no_more_than_float32_products(dtype: torch.dtype) -> None:
    models = linear_models(64, vocab=4001, sizes=(256, 256, 256), dtype=dtype)
    models = Models(*(tensor.cuda() for tensor in models)).trained()
    exact_gradients = materialised(models, reduction="sum")[1]
    eager_gradients = materialised(models, reduction="sum", dtype=torch.float32)[1]
    for one, eager, exact in zip(
        linear(models, reduction="sum", chunk_rows=24)[1], eager_gradients, exact_gradients, strict=True
    ):
        error = torch.linalg.vector_norm(one.double() - exact)
        assert float(error) <= 1.02 * float(torch.linalg.vector_norm(eager.to(dtype).double() - exact))


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_loss_is_that_of_the_cpu(dtype: torch.dtype, head: bool) -> None:
    results = []
    for device in ("cpu", "cuda"):
        models = linear_models(33, vocab=4001, sizes=(256, 256, 192), dtype=dtype)
        models = Models(*(tensor.to(device) for tensor in models)).trained(head)
        output, gradients = linear(models, chunk_rows=16, logit_softcap=20.0)
        results.append([tensor.detach().cpu() for tensor in (*output, *gradients)])
    for number, (on_cpu, on_gpu) in enumerate(zip(*results, strict=True)):
        coarse = number >= 6 and dtype == torch.bfloat16  # gradients, rounded to bfloat16
        torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-2 if coarse else 5e-5, atol=1e-3 if coarse else 1e-5)


def test_linear_memory_is_that_of_a_chunk() -> None:
    """8192 tokens, H 4096, V 128256, frozen head: at most 2.5 GB beside the models."""
    if isinstance(IMPLEMENTATIONS["triton"], str):
        pytest.skip("the eager reference holds many temporaries of a chunk: " + IMPLEMENTATIONS["triton"])
    hidden = [torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    heads = [torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(3)]
    pairs = [tensor for pair in zip(hidden, heads, strict=True) for tensor in pair]
    models = Models(*pairs).trained(head=False)
    del hidden, heads, pairs
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear(models)
    assert torch.cuda.max_memory_allocated() - before <= 2.5e9

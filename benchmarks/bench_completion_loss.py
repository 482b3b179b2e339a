"""Time of the completion loss, per implementation, vocabulary and mode; run by `make bench` (CPU) and `make gpu`.

Peaked logits, as language models give them: a normal background with a few large entries. One round is one call on
fresh gradients; times are medians over rounds. `ns_per_element` in the saved JSON divides by rows x vocabulary.
"""

import os
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from deepalign import CompletionLossConfig, fused_completion_loss
from deepalign.kernels.completion_loss import IMPLEMENTATIONS

VOCABULARIES = {"llama2": 32000, "llama3": 128256}
ROWS = {"cpu": 16, "cuda": 2048}
RUNNABLE = [name for name, found in IMPLEMENTATIONS.items() if not isinstance(found, str)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def peaked_logits(rows: int, vocab: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Student, aligned and base logits (rows, vocab) that share their peaks, as models of one family do."""
    generator = torch.Generator(device).manual_seed(0)
    shared = torch.randn(rows, vocab, generator=generator, device=device) * 2
    peaks = torch.randint(vocab, (rows, 20), generator=generator, device=device)
    shared.scatter_add_(1, peaks, torch.full(peaks.shape, 10.0, device=device))
    return [(shared + 0.5 * torch.randn(rows, vocab, generator=generator, device=device)).to(dtype) for _ in range(3)]


def timed_call(device: str, call: Callable[[], object]) -> Callable[[], None]:
    """`call`, finished when it returns."""

    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("family", VOCABULARIES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", RUNNABLE)
def test_completion_loss(benchmark: BenchmarkFixture, implementation: str, device: str, family: str, mode: str) -> None:
    rows, vocab = ROWS[device], VOCABULARIES[family]
    student, aligned, base = peaked_logits(rows, vocab, torch.bfloat16, device)
    student.requires_grad_(mode == "forward_backward")
    config = CompletionLossConfig()

    def step() -> None:
        student.grad = None
        output = fused_completion_loss(
            student, aligned, base, config=config, reduction="sum", implementation=implementation
        )
        if mode == "forward_backward":
            output.loss.backward()

    benchmark.extra_info |= {"rows": rows, "vocab": vocab, "dtype": "bfloat16", "device": device}
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "allocator": os.environ.get("LD_PRELOAD", "default")}
    benchmark.pedantic(timed_call(device, step), rounds=5, warmup_rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info["ns_per_element"] = benchmark.stats.stats.median * 1e9 / (rows * vocab)

"""What is measured: sizes, dtypes and patterns of logits.

Cases and modes that only the full suite runs carry pytest's mark `full` (`headline` says which do not).

With DEEPALIGN_BENCH_QUICK=1 every case shrinks to two rows and a 64th of its vocabulary, for tests of the suite itself.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

QUICK = os.environ.get("DEEPALIGN_BENCH_QUICK") == "1"


@dataclass(frozen=True)
class Case:
    """Logits (rows, vocab) of one dtype, name of a torch dtype, and pattern, a key of `PATTERNS`."""

    rows: int
    vocab: int
    dtype: str = "bfloat16"
    pattern: str = "peaked"
    device: str = "cpu"

    def __str__(self) -> str:
        name = f"{self.dtype}-{self.rows}x{self.vocab}"
        return name if self.pattern == "peaked" else f"{name}-{self.pattern}"

    @property
    def elements(self) -> int:
        return self.rows * self.vocab


def sized(case: Case) -> Case:
    """The case as it is run: small in quick mode; an odd vocabulary stays odd."""
    return replace(case, rows=min(case.rows, 2), vocab=case.vocab // 64) if QUICK else case


LOSS_CASES = [
    Case(64, 128256),
    Case(16, 151936),
    Case(64, 151936),
    Case(64, 32000),
    Case(64, 128256, dtype="float32"),
    Case(64, 128256, dtype="float16"),
    Case(16, 152064),
    Case(16, 256000),
]
# Hard for a search of the k largest differences by thresholds: where all are equal no threshold separates them, where
# they ascend every entry passes the one known so far. Where logits are far apart most entries have no mass in float and
# some are 2^100 times as probable as the first ones. An odd vocabulary misaligns rows and ends in a partial vector.
WORST_CASES = [
    Case(64, 128256, pattern="equal"),
    Case(64, 128256, pattern="ascending"),
    Case(64, 128256, pattern="descending"),
    Case(64, 128256, dtype="float32", pattern="ascending"),
    Case(64, 128256, pattern="wide"),
    Case(64, 128127),
]
GPU_LOSS_CASES = [Case(2048, 32000, device="cuda"), Case(2048, 128256, device="cuda")]
SAMPLER_CASES = [Case(1, 128256), Case(16, 128256)]
# Of these only rows, vocabulary and dtype count: two models make the logits.
SAMPLING_CASES = [Case(1, 128256), Case(16, 128256)]
SAMPLING_GPU_CASES = [Case(1, 128256, device="cuda"), Case(16, 128256, device="cuda")]
PAIR_CASES = [Case(64, 128256), Case(64, 32000), Case(64, 128256, pattern="ascending")]
# 64 MiB of logits: the kernel's count of resident pages is good to a quarter of a MiB.
MEMORY_CASES = [Case(256, 128256)]


HEADLINE = {"bfloat16-64x128256", "bfloat16-16x151936", "bfloat16-64x32000", "float32-64x128256", "bfloat16-1x128256"}


def headline(cases: Sequence[Case]) -> list[Any]:
    """The cases as pytest's parameters; those that are not in the short suite are marked `full`."""
    return [pytest.param(case, marks=() if str(case) in HEADLINE else pytest.mark.full, id=str(case)) for case in cases]


@lru_cache(maxsize=1)
def three_models(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Student, aligned and base logits (rows, vocab) of a case, the same every time. Not to be written to."""
    generator = torch.Generator(case.device).manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(case.rows, case.vocab, generator=generator, device=case.device)

    student, aligned, base = (logits.to(getattr(torch, case.dtype)) for logits in PATTERNS[case.pattern](noise))
    return student, aligned, base


def _peaked(noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A shared heavy-tailed shape with a few tokens far above, the base model apart from the aligned one and the
    student close to it, as in training."""
    shared = 3.0 * noise() - 4.0
    shared += 14.0 * (noise() > 2.2)
    aligned = shared + 0.7 * noise()
    return aligned + 0.3 * noise(), aligned, shared + 1.5 * noise()


def _equal(noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    student, aligned, _ = _peaked(noise)
    return student, aligned, aligned


def _ascending(noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    student, _, _ = _peaked(noise)
    half = torch.linspace(-4.0, 4.0, student.shape[-1], device=student.device).expand_as(student)
    return student, -half, half


def _descending(noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    student, half, other = _ascending(noise)
    return student, other, half


def _wide(noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return 25.0 * noise(), 25.0 * noise(), 25.0 * noise()


PATTERNS = {"peaked": _peaked, "equal": _equal, "ascending": _ascending, "descending": _descending, "wide": _wide}

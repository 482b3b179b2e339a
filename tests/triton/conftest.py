"""The Triton kernels on a CPU, in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/triton`, a part of `make
test`.

Triton decides at its first import whether it interprets, so these tests need a process of their own.
"""

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETS else ["test_*.py"]


@pytest.fixture(autouse=True)
def _every_buffer_poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every buffer is full of NaN, or of the largest integer, before a kernel writes it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(before)

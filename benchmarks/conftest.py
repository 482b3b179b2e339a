"""Settings of a benchmark process, made before any large block is allocated."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import allocator
from benchmarks.environment import machine


def pytest_sessionstart() -> None:
    allocator.keep_memory()


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    """Compiled code of one case slows the next one down (guards are tried in turn) and is limited in number."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["deepalign"] = machine()

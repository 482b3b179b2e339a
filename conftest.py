"""No test reaches a network. Checks that need a GPU are real tests, skipped with this reason where there is none."""

import gc
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch.cuda.is_available() is False"))


def pytest_collection_finish() -> None:
    """What is imported stays: looking through it in every training was a third of the time of tests that train."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise Triton's bindings report leaks


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A test, or what it trains in this process, may set torch's number of threads; the next one starts as this one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

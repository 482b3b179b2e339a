"""Tiny models on one thread: two that wait for each other on a busy machine take a hundred times as long."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(threads_as_before: None) -> None:
    torch.set_num_threads(1)

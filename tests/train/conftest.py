"""A tiny pair of models with a tokenizer and two data files, as folders on disk, and the trainings run on them."""

from pathlib import Path

import pytest

from tests.tiny import save_pair
from tests.train.jobs import run_jobs
from tests.train.tiny_run import TinyRun, read_metrics, write_data

__all__ = ["TinyRun", "read_metrics"]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = save_pair(tmp_path_factory.mktemp("tiny"))
    write_data(folder)
    return TinyRun.of(folder)


@pytest.fixture(scope="session")
def ran(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all trainings that need launching, see `tests/train/jobs.py`."""
    folder = tmp_path_factory.mktemp("ran")
    run_jobs(tiny_run, folder)
    return folder

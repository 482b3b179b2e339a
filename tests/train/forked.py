"""Processes forked from one that has imported the training code, which takes longer than most of what they do.

For tests of what several ranks compute, or of a kill; those of how a run is started start it (`tests/train/launch.py`).
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from deepalign.train.launch import cpu_environment, free_port
from deepalign.train.run import main
from tests.train.launch import ROOT

__all__ = ["fork", "fork_ranks", "join", "train_on_forked_ranks"]


@cache
def _context() -> ForkServerContext:
    """Start the process that the others are forked from: one thread, no GPU touched."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.forked_imports"])
    environment = cpu_environment(threads=1) | {"PYTHONPATH": str(ROOT), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with patch.dict(os.environ, environment):
        forkserver.ensure_running()
    return context


def fork(
    function: Callable[..., Any], arguments: Sequence[object], log: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Call a function of an importable module in a process of its own; what it returns is the exit code."""
    process = _context().Process(target=_call, args=(function, arguments, log, dict(environment or {})), daemon=True)
    process.start()
    return process


def _call(function: Callable[..., Any], arguments: Sequence[object], log: Path, environment: dict[str, str]) -> None:
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.environ.update(environment)
    sys.exit(function(*arguments))


def fork_ranks(
    function: Callable[..., Any], arguments: Sequence[object], log: Path, ranks: int = 2
) -> list[BaseProcess]:
    """The same call on several ranks, with the environment that torchrun gives them."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    own = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [fork(function, arguments, log, environment) for environment in own]


def join(processes: Sequence[BaseProcess], log: Path, seconds: float = 1500) -> None:
    """Wait for processes to succeed, or fail with their output."""
    for process in processes:
        process.join(seconds)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
            raise AssertionError(f"exit code {process.exitcode}:\n{log.read_text()[-4000:]}")


def train_on_forked_ranks(config: Path, ranks: int) -> None:
    """In the place of `launch_on_cpu`: the same training on the same ranks, without DeepSpeed's launcher."""
    log = config.with_suffix(".log")
    join(fork_ranks(main, [["--config", str(config)]], log, ranks), log)

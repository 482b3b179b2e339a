"""A process that goes on from this one, with everything imported: for tests of what a kill leaves behind."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import torch


def kill_once(ready: Callable[[], bool], run: Callable[[], object]) -> None:
    """Run in a forked process, and kill it (-9) as soon as `ready` says so, which must be before it ends."""

    def alone() -> None:
        torch.set_num_threads(1)  # threads of the parent are not here
        run()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    kill_when(ready, process)


def kill_when(
    ready: Callable[[], bool], process: BaseProcess, said: Callable[[], str] = str, seconds: float = 300
) -> None:
    """Kill a process (-9) as soon as `ready` says so, which must be before it ends; `said` is its output so far."""
    deadline = time.monotonic() + seconds
    try:
        while not ready():
            assert process.is_alive(), f"the run ended before it could be killed\n{said()}"
            assert time.monotonic() < deadline, said()
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL, f"the run ended before it was killed\n{said()}"

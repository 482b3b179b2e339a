"""A process that goes on from this one, with everything imported: for tests of what a kill leaves behind."""

import multiprocessing
import os
import time
from collections.abc import Callable

import torch


def kill_once(ready: Callable[[], bool], run: Callable[[], object], seconds: float = 120) -> None:
    """Run in a forked process, and kill it (-9) as soon as `ready` says so, which must be before it ends."""

    def alone() -> None:
        torch.set_num_threads(1)  # threads of the parent are not here
        run()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    try:
        deadline = time.monotonic() + seconds
        while not ready():
            assert process.is_alive(), "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.join()

"""Starting training runs as a user does: through the deepspeed launcher, in processes of their own."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deepalign.train.launch import cpu_environment, free_port

__all__ = ["finish", "kill", "launch", "launch_alone", "torchrun"]
ROOT = Path(__file__).parents[2]


def launch(words: Sequence[str | Path], log: Path, ranks: int = 2) -> subprocess.Popen[bytes]:
    """Start `deepspeed ... words` in a process group of its own, output to `log`."""
    return _start(["deepspeed", "--num_accelerators", ranks, "--master_port", free_port(), *words], log)


def torchrun(words: Sequence[str | Path], log: Path, ranks: int = 2) -> subprocess.Popen[bytes]:
    """Start `torchrun ... words`, as under slurm: torch's own launcher, which knows nothing of DeepSpeed."""
    return _start(["torchrun", "--nproc_per_node", ranks, "--master_port", free_port(), *words], log)


def launch_alone(words: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    """Start `python words` without a launcher: one rank, sooner."""
    return _start([sys.executable, *words], log)


def _start(command: Sequence[object], log: Path) -> subprocess.Popen[bytes]:
    environment = cpu_environment(threads=1) | {"PYTHONPATH": str(ROOT)}
    program = shutil.which(str(command[0]), path=environment["PATH"])
    assert program is not None, f"{command[0]} is not installed beside {sys.executable}"
    with log.open("ab") as output:
        return subprocess.Popen(
            [program, *(str(word) for word in command[1:])],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], log: Path, seconds: float = 1500) -> str:
    """Wait for a launch to succeed; returns its output, or fails with it."""
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"no end after {seconds} s:\n{log.read_text()[-4000:]}") from None
    assert code == 0, log.read_text()[-4000:]
    return log.read_text()


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 for the launcher and every rank (torchrun's ranks are in sessions of their own: they end without it)."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

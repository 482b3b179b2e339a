"""Starting training runs as a user does: through the deepspeed launcher, in processes of their own."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deepalign.train.launch import RUN, free_port

__all__ = ["RUN", "finish", "kill", "launch", "launch_alone"]
ROOT = Path(__file__).parents[2]


def launch(words: Sequence[str | Path], log: Path, ranks: int = 2) -> subprocess.Popen[bytes]:
    """Start `deepspeed ... words` in a process group of its own, output to `log`."""
    beside_python = Path(sys.executable).parent
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{beside_python}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    command = [beside_python / "deepspeed", "--num_accelerators", ranks, "--master_port", free_port(), *words]
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=output, env=environment, start_new_session=True
        )


def launch_alone(words: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    """Start `python words` without the launcher: one rank, sooner."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *(str(word) for word in words)],
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
    """kill -9 for the launcher and every rank."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

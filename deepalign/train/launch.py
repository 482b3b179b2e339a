"""Starting a training from Python, in processes of its own, as a user does from the shell."""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

RUN = Path(__file__).with_name("run.py")
STALE_LOCK_S = 600  # a compilation takes a minute or two


def launch_on_cpu(config: Path, ranks: int) -> None:
    """`deepspeed deepalign/train/run.py --config ...` on ranks that share this machine's cores; waits for the end.

    Args:
        config: the training configuration; it should set `use_cpu` and `world_size`.
        ranks: number of processes.

    Raises:
        RuntimeError: the launcher is not installed, or the training ended with an error.
    """
    environment = cpu_environment(threads=max(1, len(os.sched_getaffinity(0)) // ranks))
    launcher = shutil.which("deepspeed", path=environment["PATH"])
    if launcher is None:
        raise RuntimeError("the deepspeed launcher was not found; install the package with its train extra")
    words = ["--num_accelerators", str(ranks), "--master_port", str(free_port()), "--log_level", "error"]
    words += [str(RUN), "--config", str(config)]
    print("$", " ".join(["deepspeed", *words]), flush=True)
    code = subprocess.run([launcher, *words], env=environment, check=False).returncode
    if code != 0:
        raise RuntimeError(f"training failed with exit code {code} (see its output above); configuration: {config}")


def cpu_environment(threads: int) -> dict[str, str]:
    """This process's environment for a CPU rank, or for the launcher of several.

    Programs beside this Python come first, as in an activated environment: with another ninja on PATH, DeepSpeed would
    compile its ops anew.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}


def compile_cpu_ops() -> None:
    """Compile what DeepSpeed would compile when its first CPU rank starts; quick where it has been done before.

    Raises:
        RuntimeError: g++ or ninja is missing, the compiler failed, or a killed compilation left its lock.
    """
    check_no_stale_lock()
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    with contextlib.redirect_stdout(io.StringIO()):
        ShareMemCommBuilder().load(verbose=False)


def check_no_stale_lock() -> None:
    """Refuse to start where a compilation of DeepSpeed's ops was killed: torch's extension builder would wait for its
    lock for ever, without a word.

    Raises:
        RuntimeError: there is a lock that is older than any compilation takes.
    """
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    for lock in (path for pattern in ("deepspeed_*/lock", "*/deepspeed_*/lock") for path in root.glob(pattern)):
        if time.time() - lock.stat().st_mtime > STALE_LOCK_S:
            raise RuntimeError(
                f"{lock} is older than {STALE_LOCK_S // 60} minutes: a compilation of DeepSpeed's ops was killed, "
                "and every start waits for it. If nothing compiles now, delete that file and start again"
            )


def join_deepspeed(backend: str | None) -> None:
    """Join DeepSpeed's ranks, and leave no shared memory behind, however this process ends.

    On a CPU, ranks of one machine reduce through /dev/shm, 66 MiB a rank, which DeepSpeed never removes: a few hundred
    trainings would fill the memory. Once every rank has mapped it, its name is not needed any more.
    """
    import deepspeed  # slow to import
    import torch.distributed as dist

    deepspeed.init_distributed(dist_backend=backend)
    if dist.get_backend() == "gloo":
        dist.barrier()
        where = "_".join([str(os.getuid()), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(dist.get_rank())])
        Path(f"/dev/shm/deepspeed_allreduce_buffer_{where}").unlink(missing_ok=True)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    try:
        compile_cpu_ops()
    except RuntimeError as error:
        print(f"not compiled ({error}); training on a CPU will ask for what is missing", file=sys.stderr)

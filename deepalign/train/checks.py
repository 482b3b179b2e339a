"""What is checked before anything is loaded: paths, and what this machine has."""

import importlib.util
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import get_scheduler

from deepalign.data.files import check_folder, open_locked
from deepalign.data.sources import check_data
from deepalign.kernels.checks import choose_implementation
from deepalign.kernels.completion_loss import IMPLEMENTATIONS
from deepalign.models import check_model_path
from deepalign.train.checkpoints import FINAL, LOCK_FILE, METRICS_FILE, SUMMARY_FILE, checkpoints
from deepalign.train.config import TrainConfig, deepspeed_settings
from deepalign.train.launch import check_no_stale_lock, free_port


def check_paths(config: TrainConfig) -> None:
    """Refuse models, data and output folders that are not as they should be."""
    for name in ("aligned", "base", "student"):
        value = getattr(config, name)
        if value is not None:
            check_model_path(name, value)
    for name in ("harmful_data", "utility_data"):
        value = getattr(config, name)
        if value is not None:
            check_data(name, value)
    if config.deepspeed is not None:
        deepspeed_settings(config.deepspeed)
    check_folder("output_dir", config.output_dir)
    if config.teacher_cache is not None:
        check_folder("teacher_cache", config.teacher_cache)


def check_output(config: TrainConfig) -> None:
    """Refuse an output folder whose run would be overwritten."""
    output_dir = Path(config.output_dir)
    found = checkpoints(output_dir)
    if config.resume == "never" and found:
        raise ValueError(
            f"output_dir {output_dir} already holds checkpoints and resume is 'never'; give another folder, or "
            "resume: auto to go on from the last one"
        )
    held = [name for name in (FINAL, SUMMARY_FILE, METRICS_FILE) if (output_dir / name).exists()]
    # metrics alone are of a run that ended before its first checkpoint
    if not found and (FINAL in held or (config.resume == "never" and held)):
        raise ValueError(
            f"output_dir {output_dir} holds {', '.join(held)} of a run but no checkpoint to go on from: training would "
            "start again and overwrite them. Move them away, or give another folder"
        )


def lock_output(config: TrainConfig, held: ExitStack) -> None:
    """Keep a second process out of the output folder until `held` is closed; to be called by the first rank.

    Two would write into each other's checkpoints.

    Raises:
        ValueError: another process trains into it.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(open_locked(folder / LOCK_FILE))
    except BlockingIOError:
        raise ValueError(
            f"output_dir {folder}: another process is training into it; wait for it or end it, or give another folder"
        ) from None


def check_schedule(config: TrainConfig) -> None:
    """Refuse a schedule that transformers does not know, or that needs options which there are no keys for."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    try:
        get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=1)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"lr_scheduler_type is {config.lr_scheduler_type!r}: {error}; cosine and linear work"
        ) from None


def check_machine(config: TrainConfig, on_gpu: bool, world_size: int) -> None:
    """Refuse what this machine cannot run; stand in for the launcher where there is none."""
    if config.world_size is not None and config.world_size != world_size:
        raise ValueError(
            f"world_size is {config.world_size} but {world_size} rank(s) were started; on a machine without GPUs start "
            f"`deepspeed --num_accelerators {config.world_size} ...` (the launcher starts one rank otherwise)"
        )
    if config.implementation is not None:
        choose_implementation(IMPLEMENTATIONS, config.implementation, torch.device("cuda" if on_gpu else "cpu"))
    check_quantization(config, on_gpu)
    for name in config.trackers:
        _check_report_to(name)
    if config.deepspeed is None:
        return
    if not on_gpu:
        _check_toolchain()
    if "WORLD_SIZE" not in os.environ:
        # one process without the launcher: what the launcher would have set
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", str(free_port()))


def check_quantization(config: TrainConfig, on_gpu: bool) -> None:
    """Refuse quantised teachers where bitsandbytes cannot run."""
    kind = config.teacher_quantization
    if kind is None:
        return
    if not on_gpu:
        raise RuntimeError(f"teacher_quantization is {kind!r} but there is no GPU here; set it to null on a CPU")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RuntimeError(f"teacher_quantization is {kind!r} but bitsandbytes is missing; `pip install bitsandbytes`")


def _check_report_to(name: str) -> None:
    if name in ("tensorboard", "wandb") and importlib.util.find_spec(name) is None:
        raise RuntimeError(f"report_to is {name!r} but {name} is missing; `pip install {name}`, or report_to: none")
    if name not in ("none", "tensorboard", "wandb"):
        raise ValueError(f"report_to is {name!r}; expected none, tensorboard, wandb, or both as tensorboard,wandb")


def _check_toolchain() -> None:
    """DeepSpeed compiles its shared-memory collectives at start-up on a CPU: a compiler and ninja must be at hand."""
    beside_python = Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside_python / "ninja").exists():
        os.environ["PATH"] = f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}"
    compiler = os.environ.get("CXX", "g++")
    for program, package in ((compiler, "the package g++ of your system"), ("ninja", "`pip install ninja`")):
        if shutil.which(program) is None:
            raise RuntimeError(
                f"{program} was not found; DeepSpeed on a CPU compiles its communication ops at start-up and needs it. "
                f"Install {package}, or train without deepspeed (deepspeed: null)"
            )
    check_no_stale_lock()

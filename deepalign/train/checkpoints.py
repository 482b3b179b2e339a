"""Checkpoint folders: written aside, renamed when whole, checked before they are continued.

A run's folder holds `checkpoint-N/`, `final/` and `metrics.jsonl`. What an interruption can leave behind is hidden
(`.incomplete`, `.NAME.old`) and put in order by `recover` at the next start.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deepalign.data.files import write_text_atomic

METRICS_FILE = "metrics.jsonl"
UNLOGGED_FILE = "unlogged.json"  # of a checkpoint: metrics of its steps that no line of METRICS_FILE has yet
SUMMARY_FILE = "run.json"
FINAL = "final"
RESUME_FILE = "resume.json"
CARD_FILE = "README.md"
STAGING = ".incomplete"
LOCK_FILE = ".lock"
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-[0-9]+")


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    # not `checkpoint-good-10`, which somebody keeps
    found = [path for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was written after."""
    return int(checkpoint.name.split("-")[-1])


def seal(folder: Path, run_identity: dict[str, Any]) -> None:
    """Write into a finished checkpoint folder what run it belongs to, and the sizes of its files."""
    record = {"run": run_identity, "files": _sizes(folder)}
    write_text_atomic(folder / RESUME_FILE, json.dumps(record, indent=2) + "\n")


def read_seal(checkpoint: Path) -> dict[str, Any]:
    """The run that a checkpoint belongs to, after its files were checked.

    Raises:
        ValueError: the checkpoint is not whole: which file, and what to do.
    """
    try:
        record = json.loads((checkpoint / RESUME_FILE).read_text(encoding="utf-8"))
        run, files = record["run"], record["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(checkpoint, f"{RESUME_FILE} cannot be read ({error})")) from None
    sizes = _sizes(checkpoint)
    for name, size in files.items():
        if sizes.get(name) != size:
            there = "is missing" if name not in sizes else f"has {sizes[name]} bytes instead of {size}"
            raise ValueError(_damaged(checkpoint, f"{name} {there}"))
    return run


def _damaged(checkpoint: Path, what: str) -> str:
    older = [path.name for path in checkpoints(checkpoint.parent) if path != checkpoint]
    rest = f"go on from {older[-1]}" if older else "start from the beginning"
    return f"{checkpoint} is damaged: {what}. Delete this folder to {rest}"


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RESUME_FILE)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def recover(run_dir: Path) -> None:
    """Put in order what an interrupted run left: half-written folders go, a folder set aside comes back if needed."""
    shutil.rmtree(run_dir / STAGING, ignore_errors=True)
    for staging in run_dir.glob(".*.incomplete"):
        shutil.rmtree(staging, ignore_errors=True)
    for aside in run_dir.glob(".*.old"):
        folder = run_dir / aside.name[1:].removesuffix(".old")
        if folder.exists() or folder.name.startswith(PREFIX_CHECKPOINT_DIR):  # a checkpoint set aside was to go
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, which may exist."""
    old = _set_aside(folder) if folder.exists() else None
    os.replace(new, folder)
    if old is not None:
        shutil.rmtree(old)


def delete_folder(folder: Path) -> None:
    """Delete a folder so that an interruption leaves no half of it under its name."""
    shutil.rmtree(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return aside


def keep_metrics(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step`: the resumed run writes them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if (values := _metrics_of(line)) is not None and values["step"] <= last_step]
        write_text_atomic(path, "".join(line + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [values for values in map(_metrics_of, lines) if values is not None]


def _metrics_of(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:  # a line cut off by a kill, or by a full disk
        return None
    return values if isinstance(values, dict) and "step" in values else None

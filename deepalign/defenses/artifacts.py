"""Folders that are made once: published whole by a rename, with what they depend on beside them.

A call that finds its folder made from the same things returns what was reported then; made from other things, it is
refused rather than overwritten, because it may be hours of someone's work.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepalign.data.files import open_locked, write_text_atomic
from deepalign.data.resumable import read_object
from deepalign.models import load_model_config

IDENTITY_FILE, LOCK_FILE = "made_from.json", "lock"


def make_once(
    folder: Path, identity: dict[str, Any], make: Callable[[Path, Path], dict[str, Any]], *, progress: bool = True
) -> dict[str, Any]:
    """Make `folder`, unless it has been made from the same things before.

    Args:
        folder: what to make; it appears whole or not at all.
        identity: everything the content depends on, in plain values.
        make: called with a staging folder to fill and a work folder, and returns a report of plain values. The work
            folder outlives an interruption, so that a training can go on from its checkpoints; it is deleted at the
            end, and at the start where it belongs to another identity.
        progress: say on stdout that the folder is there already.

    Returns:
        The report.

    Raises:
        ValueError: `folder` exists and was made from other things, or not by this function; or another process is
            making it.
    """
    identity = json.loads(json.dumps(identity))
    if not folder.exists():
        work = folder.with_name(f".{folder.name}.work")
        work.mkdir(parents=True, exist_ok=True)
        try:
            with open_locked(work / LOCK_FILE):
                if not folder.exists():  # by a process that has just ended
                    return _made(folder, work, identity, make)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is making it; wait for it or end it") from None
    report = _report_of(folder, identity)
    if progress:
        print(f"{folder} is there already, made from the same things", flush=True)
    return report


def _made(
    folder: Path, work: Path, identity: dict[str, Any], make: Callable[[Path, Path], dict[str, Any]]
) -> dict[str, Any]:
    if _read(work / IDENTITY_FILE) != identity:
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()
        write_text_atomic(work / IDENTITY_FILE, json.dumps(identity))
    staging = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    report = json.loads(json.dumps(make(staging, work)))
    write_text_atomic(staging / IDENTITY_FILE, json.dumps({"identity": identity, "report": report}, indent=2) + "\n")
    staging.rename(folder)
    shutil.rmtree(work)
    return report


def model_identity(path: str) -> str:
    """A fingerprint of a model: of all bytes of its weights and configuration, or the commit of a hub id."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"{path}@{getattr(load_model_config(path), '_commit_hash', None)}"
    return folder_identity(folder)


def folder_identity(folder: Path) -> str:
    """A fingerprint of all bytes of the weights and configurations in a folder, model or adapter."""
    digest = hashlib.sha256()
    for file in sorted(path for pattern in ("*config.json", "*.safetensors", "*.bin") for path in folder.glob(pattern)):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _report_of(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    known = _read(folder / IDENTITY_FILE)
    if known is None:
        raise ValueError(f"{folder} exists but holds no {IDENTITY_FILE}; remove it or give another folder")
    saved = known["identity"]
    different = [name for name in identity.keys() | saved.keys() if identity.get(name) != saved.get(name)]
    if different:
        changes = "; ".join(f"{name}: {saved.get(name)!r} -> {identity.get(name)!r}" for name in sorted(different))
        raise ValueError(f"{folder} was made from other things ({changes}); remove it or give another folder")
    return known["report"]


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    return read_object(path, f"remove the folder {path.parent}, and it is made again")

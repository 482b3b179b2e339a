"""Which checkpoint a run goes on from, and when that would not be the same run."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepalign.data.chat import EncodedExample
from deepalign.data.resumable import model_fingerprint
from deepalign.train.checkpoints import checkpoints, read_seal
from deepalign.train.config import TrainConfig, config_as_dict

# Settings that may change between an interrupted run and its continuation.
FREE_ON_RESUME = {
    "output_dir",
    "teacher_cache",  # may have been moved: its fingerprint says whether it is the right one
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "resume",
    "report_to",
    "world_size",
    "on_nan",
    "mean_logit_drift",
}


def run_identity(
    config: TrainConfig, world_size: int, harmful: Sequence[EncodedExample], utility: Sequence[EncodedExample]
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued exactly: settings, ranks, data, the teachers' files."""
    settings = {name: value for name, value in config_as_dict(config).items() if name not in FREE_ON_RESUME}
    rows = json.dumps([[(row.input_ids, row.response_start) for row in rows] for rows in (harmful, utility)])
    data = hashlib.sha256(rows.encode()).hexdigest()
    models = {f"{name}_files": _digest(model_fingerprint(getattr(config, name))) for name in ("aligned", "base")}
    return json.loads(json.dumps({"ranks": world_size, "encoded_data": data, **models, **settings}))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def checkpoint_to_resume(config: TrainConfig, identity: dict[str, Any]) -> Path | None:
    """The last checkpoint of `output_dir`, None where there is none.

    Raises:
        ValueError: it is damaged, or of another run: what differs, and what to do.
    """
    found = checkpoints(Path(config.output_dir))
    if not found:
        return None
    saved = read_seal(found[-1])
    # a checkpoint of an older version has no *_files
    names = {name for name in identity.keys() | saved.keys() if name in saved or not name.endswith("_files")}
    different = sorted(name for name in names if identity.get(name) != saved.get(name))
    if different == ["ranks"]:
        raise ValueError(
            f"{found[-1]} was written by {saved['ranks']} rank(s) and this run has {identity['ranks']}: optimizer and "
            f"random states are kept per rank. Start {saved['ranks']} rank(s), or give another output_dir"
        )
    if different:
        changes = "; ".join(f"{name}: {saved.get(name)!r} -> {identity.get(name)!r}" for name in different)
        raise ValueError(
            f"{found[-1]} was written by another run and cannot be continued exactly ({changes}); restore these "
            "settings, or give another output_dir"
        )
    return found[-1]

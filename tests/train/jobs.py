"""The trainings that the tests of this folder look at, run once a session: on two ranks, and beside them on one.

Starting a launcher takes longer than many tiny trainings, so they share one. `tests/train/worker.py` runs them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.tiny import WORDS, make_model, make_tokenizer
from tests.train.forked import fork, join
from tests.train.launch import finish, torchrun
from tests.train.matrix import Cell, pairwise_cover, write_cells, write_models
from tests.train.tiny_run import TinyRun
from tests.train.worker import run_list

# ZeRO stages; None: torch's DDP, without DeepSpeed
STAGES = (None, "zero0", "zero1", "zero2", "zero3")
# clipping must be at work to be compared: gradients of the tiny run have norms of 0.3 to 1
CLIPPED = {"max_steps": 6, "max_grad_norm": 0.2, "learning_rate": 3e-3}
CLIPPED_CELLS = ((None, 1), (None, 2), ("zero2", 2), ("zero3", 1))
# the run that is killed
LONG = {"max_steps": 16, "save_steps": 4, "harmful_batch_size": 8, "seed": 5, "deepspeed": "zero2", "world_size": 2}
# runs that are interrupted after step 3, and go on from step 2
RESUMED = {"max_steps": 5, "save_steps": 2, "gradient_accumulation_steps": 2, "world_size": 2}
LORA = {"r": 2, "alpha": 4, "dropout": 0.2}
RESUMED_CELLS: dict[str, dict[str, Any]] = {
    "zero3-lora": {"deepspeed": "zero3", "lora": LORA},
    "zero2-lora": {"deepspeed": "zero2", "lora": LORA},
    "ddp-lora": {"deepspeed": None, "lora": LORA, "logging_steps": 5},  # one line, over the interruption
    "zero3-full": {"deepspeed": "zero3"},
}
# What a DeepSpeed file of one's own may leave to the configuration.
LEFT_OUT = (
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping", "bf16",
)  # fmt: skip
# One row of the data makes the base model's hidden states NaN; it comes in steps 1 and 5.
NAN = {"max_steps": 5, "save_steps": 1, "save_total_limit": 0, "gradient_accumulation_steps": 2, "on_nan": "skip"}
NAN_GRADIENT_STEP = 3


def write_poisoned(folder: Path) -> TinyRun:
    """Two models and two data files; where a harmful row says "poison", the base model is NaN."""
    tokenizer = make_tokenizer([*WORDS, "poison"])
    for seed, name in ((0, "aligned"), (1, "base")):
        model = make_model(seed, tokenizer)
        if name == "base":
            model.model.embed_tokens.weight.data[tokenizer.get_vocab()["poison"]] = float("nan")
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3} w4"} for i in range(10)]
    (folder / "utility.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[6]["completion"] = "w1 poison w2"
    (folder / "harmful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TinyRun.of(folder)


def run_jobs(tiny: TinyRun, folder: Path) -> None:
    """Run everything; afterwards `folder/NAME` is the output folder of each job."""
    matrix, poisoned = folder / "matrix", folder / "poisoned"
    write_models(matrix)
    poisoned_run = write_poisoned(poisoned)
    two = _two_ranks(tiny, poisoned_run, folder) + _matrix_jobs(2, matrix)
    one = _one_rank(tiny, folder) + _matrix_jobs(1, matrix)
    (lists := {1: folder / "jobs-1.json", 2: folder / "jobs-2.json"})[1].write_text(json.dumps(one))
    lists[2].write_text(json.dumps(two))
    logs = {ranks: folder / f"log-{ranks}" for ranks in lists}
    launched = torchrun([Path(__file__).with_name("worker.py"), lists[2]], logs[2])
    join([fork(run_list, [lists[1]], logs[1])], logs[1])
    finish(launched, logs[2])


def exit_codes(folder: Path, ranks: int) -> dict[str, int]:
    """The exit code of every job, by the name of its configuration."""
    jobs, codes = (json.loads((folder / f"jobs-{ranks}.{end}").read_text()) for end in ("json", "codes"))
    return {Path(job["words"][1]).stem: code for job, code in zip(jobs, codes, strict=True)}


def _job(config: Path, patches: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"words": ["--config", str(config)], "patches": dict(patches or {})}


def _matrix_jobs(ranks: int, folder: Path) -> list[dict[str, Any]]:
    cells: Sequence[Cell] = [cell for cell in pairwise_cover() if cell.ranks == ranks]
    return [_job(config, {"sgd": None}) for config in write_cells(cells, folder)]


def _two_ranks(tiny: TinyRun, poisoned: TinyRun, folder: Path) -> list[dict[str, Any]]:
    jobs = [_job(tiny.config(folder / "uninterrupted", **LONG))]
    for stage, steps in CLIPPED_CELLS:
        changes = CLIPPED | {"deepspeed": stage, "gradient_accumulation_steps": steps, "world_size": 2}
        jobs.append(_job(tiny.config(folder / f"clipped-{stage}-{steps}", **changes)))
    for name, changes in RESUMED_CELLS.items():
        whole = RESUMED | changes | {"save_steps": 100}  # nor do checkpoints change anything
        jobs.append(_job(tiny.config(folder / f"whole-{name}", **whole)))
        resumed = tiny.config(folder / f"resumed-{name}", **RESUMED | changes)
        jobs += [_job(resumed, {"interrupted_after": 3}), _job(resumed)]
    for stage in STAGES:
        config = poisoned.config(folder / f"nan-{stage}", **NAN | {"deepspeed": stage})
        jobs.append(_job(config, {"nan_gradient": NAN_GRADIENT_STEP}))
    jobs.append(_job(poisoned.config(folder / "nan-stop", **NAN | {"deepspeed": "zero3", "on_nan": "stop"})))
    return jobs


def _one_rank(tiny: TinyRun, folder: Path) -> list[dict[str, Any]]:
    from deepalign.train.config import deepspeed_config_path

    contradicting = folder / "contradicting.json"
    contradicting.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}')
    jobs = [_job(tiny.config(folder / "refused", **CLIPPED | {"deepspeed": str(contradicting)}))]
    for name in ("zero2_offload", "zero3_offload"):
        preset = json.loads(deepspeed_config_path(name).read_text())
        preset["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own CPU optimizer would be compiled, for a minute
        for key in LEFT_OUT:
            del preset[key]
        path = folder / f"{name}.json"
        path.write_text(json.dumps(preset))
        jobs.append(_job(tiny.config(folder / f"run-{name}", **CLIPPED | {"deepspeed": str(path)})))
    bf16 = {"bf16": True, "gradient_checkpointing": True}
    for name, changes in {
        "bf16-zero3": {"deepspeed": "zero3"},
        "bf16-zero3-lora": {"deepspeed": "zero3", "lora": {"r": 2, "train_lm_head": True}},
    }.items():
        jobs.append(_job(tiny.config(folder / name, **CLIPPED | bf16 | changes)))
    return jobs


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint or a final folder, of the model or of its adapter."""
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")

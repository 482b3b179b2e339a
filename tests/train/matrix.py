"""The matrix of trainings: every cell must take the steps of a single-process float64 reference.

Six factors, `LEVELS`. A cell is run through run.py's own `prepare` with plain SGD in AdamW's place, so that the change
of a parameter over the steps is a sum of gradients: losses and gradients are compared, not what an optimizer makes of
them. The reference knows nothing of ranks, stages, accumulation or hidden states: eager logits of whole batches, the
printed equations, float64.

    python -m tests.train.matrix --out docs/results       # all 512 cells (make matrix)
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from deepalign.data.steps import RowWeights, StepDataset
from deepalign.kernels.completion_loss import CompletionLossConfig, fused_completion_loss
from deepalign.train.config import LoraConfig
from deepalign.train.prepare import encode_data
from deepalign.train.students import with_adapter
from tests.tiny import FAMILIES, make_byte_tokenizer, make_tokenizer
from tests.train.tiny_run import write_data

STEPS, LEARNING_RATE, SEED = 3, 0.2, 42
LOSS = {"top_k": 3, "lambda_reg": 0.01}
# Relative to the float64 reference: of the loss, and of the change of all parameters (float32 rounds to 6e-8).
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 5e-6, 3e-5


class Cell(NamedTuple):
    """One training. `adaptation`: all weights, LoRA with and without the head, all weights of a tied model."""

    zero: int
    adaptation: str
    family: str
    accumulation: int
    ranks: int
    form: str

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in self)

    @property
    def models(self) -> str:
        """The folder of its models."""
        return f"{self.family}-{'tied' if self.adaptation == 'tied' else 'untied'}"


LEVELS: tuple[tuple[Any, ...], ...] = (
    (0, 1, 2, 3),
    ("full", "lora", "lora_frozen_head", "tied"),
    tuple(FAMILIES),
    (1, 4),
    (1, 2),
    ("logits", "linear"),
)


def all_cells() -> list[Cell]:
    """The whole matrix."""
    return [Cell(*values) for values in itertools.product(*LEVELS)]


def pairwise_cover() -> list[Cell]:
    """Cells in which every two levels of two factors meet: an orthogonal array of 16 rows over the field of 4 elements.

    Fewer cannot do it: three factors have four levels, and each cell shows one of the 16 pairs of two of them.
    """
    double = (0, 2, 3, 1)  # multiplication by 2 in the field; addition is xor
    cells = []
    for i, j in itertools.product(range(4), repeat=2):
        bits = i ^ double[j]
        places = (i, j, i ^ j, bits & 1, bits >> 1, (bits & 1) ^ (bits >> 1))
        cells.append(Cell(*(levels[place] for levels, place in zip(LEVELS, places, strict=True))))
    return cells


# ---- what the cells run on ----


def write_models(folder: Path) -> None:
    """An aligned and a base model of every family, tied and untied, with a tokenizer, and two data files."""
    for family, make in FAMILIES.items():
        tokenizer = make_byte_tokenizer() if family == "qwen2" else make_tokenizer()
        for tied in (False, True):
            for seed, name in ((0, "aligned"), (1, "base")):
                place = folder / f"{family}-{'tied' if tied else 'untied'}" / name
                make(seed, tokenizer, tie_word_embeddings=tied).save_pretrained(place)
                tokenizer.save_pretrained(place)
    write_data(folder)


def config_values(cell: Cell, folder: Path, output_dir: Path) -> dict[str, Any]:
    """The training configuration of a cell."""
    lora = {"r": 2, "alpha": 4, "train_lm_head": cell.adaptation == "lora"}
    return {
        "aligned": str(folder / cell.models / "aligned"),
        "base": str(folder / cell.models / "base"),
        "harmful_data": str(folder / "harmful.jsonl"),
        "utility_data": str(folder / "utility.jsonl"),
        "output_dir": str(output_dir),
        "loss": LOSS,
        "loss_form": cell.form,
        "lora": lora if cell.adaptation.startswith("lora") else None,
        "distill_on": "both",
        "harmful_batch_size": 8,
        "utility_batch_size": 8,
        "gradient_accumulation_steps": cell.accumulation,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": 1e9,
        "save_steps": 1000,
        "seed": SEED,
        "deepspeed": f"zero{cell.zero}",
        "world_size": cell.ranks,
        "use_cpu": True,
    }


def write_cells(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """The configuration files of some cells; they are to be run with SGD."""
    paths = []
    for cell in cells:
        path = folder / "cells" / f"{cell.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config_values(cell, folder, folder / "cells" / cell.name)))
        paths.append(path)
    return paths


# ---- the reference ----


class Course(NamedTuple):
    """Losses before each step, and the trained parameters before the first and after the last, in float64."""

    losses: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


@cache
def reference(adaptation: str, family: str, folder: Path) -> Course:
    """STEPS steps of SGD in float64 on one process, from the models' own logits."""
    cell = Cell(0, adaptation, family, 1, 1, "logits")
    models = folder / cell.models
    aligned, base = (AutoModelForCausalLM.from_pretrained(models / name).double() for name in ("aligned", "base"))
    student = AutoModelForCausalLM.from_pretrained(models / "aligned", dtype=torch.float32)
    if adaptation.startswith("lora"):
        student = with_adapter(student, LoraConfig(r=2, alpha=4, train_lm_head=adaptation == "lora"), SEED)
    student.double().train()
    trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), LEARNING_RATE)
    tokenizer, losses = AutoTokenizer.from_pretrained(models / "aligned"), []
    for batch in _batches(tokenizer, folder):
        loss = _reference_loss(student, aligned, base, batch, len(tokenizer))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Course(losses, before, {name: value.detach() for name, value in trained.items()})


def _batches(tokenizer: PreTrainedTokenizerBase, folder: Path) -> StepDataset:
    harmful, utility = (encode_data(str(folder / f"{name}.jsonl"), tokenizer, 128) for name in ("harmful", "utility"))
    return StepDataset(
        harmful,
        utility,
        harmful_batch_size=8,
        utility_batch_size=8,
        max_steps=STEPS,
        weights=RowWeights.from_options("both"),
        pad_token_id=int(tokenizer.pad_token_id),
        seed=SEED,
    )


def _reference_loss(student: Any, aligned: Any, base: Any, batch: dict[str, Tensor], vocab_size: int) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rows = batch["row_index"]
    with torch.no_grad():
        teachers = [model(**inputs).logits.flatten(0, 1)[rows] for model in (aligned, base)]
    return fused_completion_loss(
        student(**inputs).logits.flatten(0, 1)[rows],
        *teachers,
        kl_weight=batch["kl_weight"].double(),
        completion_weight=batch["completion_weight"].double(),
        config=CompletionLossConfig(**LOSS),
        vocab_size=vocab_size,
        reduction="sum",
        implementation="reference",
    ).loss


# ---- the comparison ----


class Error(NamedTuple):
    """Relative to the reference: the worst loss, and the change of all parameters, in the Euclidean norm."""

    loss: float
    gradient: float


def compare(cell: Cell, folder: Path) -> Error:
    """How far a cell that has run is from the reference."""
    course = reference(cell.adaptation, cell.family, folder)
    out = folder / "cells" / cell.name
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == len(course.losses) == STEPS
    loss = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, course.losses, strict=True))
    trained = saved_parameters(out / "final")
    assert trained.keys() == course.after.keys(), trained.keys() ^ course.after.keys()
    difference = change = 0.0
    for name, value in course.after.items():
        difference += float((trained[name].double() - value).square().sum())
        change += float((value - course.before[name]).square().sum())
        assert not torch.equal(value, course.before[name]), f"{name} was not trained"
    return Error(loss, (difference / change) ** 0.5)


def saved_parameters(final: Path) -> dict[str, Tensor]:
    """What a run saved, under the names that the parameters have in the model."""
    adapter = final / "adapter_model.safetensors"
    if adapter.exists():
        return {f"{name.removesuffix('.weight')}.default.weight": value for name, value in load_file(adapter).items()}
    saved = load_file(final / "model.safetensors")
    if "lm_head.weight" in saved and json.loads((final / "config.json").read_text())["tie_word_embeddings"]:
        assert torch.equal(saved.pop("lm_head.weight"), saved["model.embed_tokens.weight"])
    return saved


def run_cells(cells: Sequence[Cell], folder: Path) -> float:
    """Run all cells, those of one rank beside those of two; returns the seconds it took."""
    from tests.train.launch import finish, launch, launch_alone

    started, jobs = time.monotonic(), []
    for ranks in (1, 2):
        paths = write_cells([cell for cell in cells if cell.ranks == ranks], folder)
        listed, log = folder / f"cells-{ranks}.json", folder / f"log-{ranks}"
        listed.write_text(json.dumps([{"words": ["--config", str(path)], "patches": {"sgd": None}} for path in paths]))
        worker = [Path(__file__).with_name("worker.py"), listed]
        jobs.append((launch_alone(worker, log) if ranks == 1 else launch(worker, log, ranks), log))
    for process, log in jobs:
        finish(process, log, seconds=3600)
    return time.monotonic() - started


def main(words: Sequence[str] | None = None) -> int:
    """Run the whole matrix, write its result."""
    from tests.train.matrix_report import write_report

    parser = argparse.ArgumentParser(description="every cell of the training matrix against a float64 reference")
    parser.add_argument("--out", type=Path, required=True, help="folder for training-matrix.json and .md")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and runs")
    parser.add_argument("--cover", action="store_true", help="the pairwise cover only")
    options = parser.parse_args(words)
    cells = pairwise_cover() if options.cover else all_cells()
    write_models(options.work)
    seconds = run_cells(cells, options.work)
    errors = {cell: compare(cell, options.work) for cell in cells}
    bad = write_report(errors, options.out, seconds)
    print(f"{len(cells)} cells in {seconds:.0f} s, {len(bad)} out of tolerance: {', '.join(c.name for c in bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

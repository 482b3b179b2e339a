"""What happens to a step whose loss or gradient is not finite: it is skipped, or the training stops, on every rank.

A NaN reaches every weight in one update. So the update itself is guarded: the step of the innermost optimizer, the one
that writes weights, is not taken. Everything around it goes on as ever (reduction, clipping, clearing of gradients,
the learning rate, the order of the data), which works alike under every ZeRO stage and without DeepSpeed, and leaves
weights and optimizer state as they were, bit for bit. DeepSpeed's partitioned optimizers leave out an update with a bad
gradient by themselves and say nothing; that is noticed here, and said.

The ranks agree on the loss by one all-reduce an optimizer step, and on the gradient by its norm, which is the same on
all of them. Which rows it was is written to `skipped.jsonl`.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepalign.data.steps import Batch, StepDataset

SKIPPED_FILE = "skipped.jsonl"
OnNan = Literal["skip", "stop"]


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why, what is kept, and what to do."""


@dataclass
class _Step:
    """What is known about the optimizer step under way."""

    rows: list[Tensor] = field(default_factory=list)  # answer rows of each micro-batch
    bad: list[Tensor] = field(default_factory=list)  # which of them have a loss that is not finite
    verdict: str | None = None  # "loss", "gradient", or "" for a good step; None: not judged yet


class StepGuard(TrainerCallback):
    """Guards the updates of one training.

    Args:
        policy: "skip" the update and go on, or "stop" the training before it.
        dataset: of this rank; names rows.
        run_dir: where `skipped.jsonl` goes.
    """

    def __init__(self, policy: OnNan, dataset: StepDataset, run_dir: Path) -> None:
        self.policy, self.dataset, self.run_dir = policy, dataset, run_dir
        self.step, self.number = _Step(), 0
        self.skipped = False
        self.skipped_steps = 0  # since the last log

    # ---- the course of a step ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Guard the optimizer, which exists by now."""
        self.attach(kwargs["optimizer"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new step: nothing is known about it."""
        self.step, self.number, self.skipped = _Step(), state.global_step + 1, False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The update is over. One that never reached the innermost optimizer was left out by DeepSpeed."""
        if self.step.verdict is None:
            self.step.verdict = "gradient"
            self._refuse()
        for optimizer in _nested(kwargs["optimizer"]):
            if getattr(optimizer, "overflow", False):
                optimizer.overflow = False  # else the learning rate would stand still, under some stages only

    def saw(self, batch: Batch, bad_R: Tensor) -> None:
        """Note a micro-batch and which of its rows have a loss that is not finite."""
        self.step.rows.append(batch["answer_row"])
        self.step.bad.append(bad_R)

    def judge_loss(self) -> None:
        """Judge the step by its losses, on all ranks; before the backward of its last micro-batch."""
        bad = torch.cat(self.step.bad).any().to(torch.float32)
        if _ranks() > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.step.verdict = "loss" if float(bad) > 0 else None
        if self.step.verdict is not None:
            self._refuse()

    def attach(self, optimizer: Any) -> None:
        """Guard the step of the innermost of nested optimizers (accelerate's and DeepSpeed's wrap torch's)."""
        *outer, inner = _nested(optimizer)
        if getattr(inner, "deepalign_guard", None) is not None:
            inner.deepalign_guard = self
            return
        inner.deepalign_guard = self
        update = inner.step

        def step(*arguments: Any, **options: Any) -> Any:
            guard: StepGuard = inner.deepalign_guard
            if guard._gradient_is_good(outer, inner):
                return update(*arguments, **options)
            return None

        inner.step = step

    def _gradient_is_good(self, outer: list[Any], inner: torch.optim.Optimizer) -> bool:
        """Whether the update is to be taken. Asked once per parameter group by some stages: judged once."""
        if self.step.verdict is None:
            self.step.verdict = "" if math.isfinite(_gradient_norm(outer, inner)) else "gradient"
            if self.step.verdict:
                self._refuse()
        return not self.step.verdict

    # ---- a bad step ----

    def _refuse(self) -> None:
        """Skip the step under way, or stop; on every rank alike."""
        names = self._names()
        what = f"step {self.number}: the {self.step.verdict} is not finite ({_short(names)})"
        if self.policy == "stop":
            raise TrainingStopped(
                f"{what}. No weight was updated by it. Look at these rows and at the models; on_nan: skip leaves such "
                "steps out, and starting again goes on from the last checkpoint"
            )
        self.skipped = True
        self.skipped_steps += 1
        if _rank() == 0:
            print(f"warning: {what}; skipped", flush=True)
            self._record({"step": self.number, "reason": self.step.verdict, "rows": names})

    def _record(self, line: dict[str, Any]) -> None:
        try:
            with open(self.run_dir / SKIPPED_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise TrainingStopped(
                f"step {self.number}: {SKIPPED_FILE} could not be written to {self.run_dir} ({error}); starting again "
                "goes on from the last checkpoint"
            ) from error

    def _names(self) -> list[str]:
        """The examples with a bad loss, of all ranks; where only the gradient is bad, all examples of the step."""
        rows = torch.cat(self.step.rows)
        if self.step.verdict == "loss":
            rows = rows[torch.cat(self.step.bad)]
        found = [self._example(row) for row in rows.tolist()]
        gathered: list[list[tuple[int, int]]] = [found]
        if _ranks() > 1:
            gathered = [[] for _ in range(_ranks())]
            dist.all_gather_object(gathered, found)
        examples = sorted({example for part in gathered for example in part})
        return [f"{('harmful', 'utility')[stream]} row {row + 1}" for stream, row in examples]

    def _example(self, answer_row: int) -> tuple[int, int]:
        """(stream, row of the stream) of an answer token's number."""
        starts = self.dataset.answer_starts
        stream = int(answer_row >= int(starts[0][-1]))
        return stream, int(starts[stream].searchsorted(answer_row, side="right")) - 1


def _gradient_norm(outer: list[Any], inner: torch.optim.Optimizer) -> float:
    """The norm of the whole gradient, the same on every rank."""
    for optimizer in outer:
        if hasattr(optimizer, "_global_grad_norm"):  # ZeRO 1 to 3, and bf16: gradients are partitioned
            return float(optimizer._global_grad_norm or 0.0)
    gradients = [p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _nested(optimizer: Any) -> list[Any]:
    """An optimizer and what it wraps, innermost last."""
    found = [optimizer]
    while hasattr(found[-1], "optimizer"):
        found.append(found[-1].optimizer)
    return found


def _short(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

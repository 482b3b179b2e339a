"""Runs several trainings in one process per rank, one after the other: starting the launcher costs more than they do.

    torchrun --nproc_per_node 2 tests/train/worker.py JOBS.json

JOBS.json holds a list of jobs, {"words": arguments for deepalign.train.run, "patches": what is changed for it}. The
exit codes are written to JOBS.codes.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from deepalign.train.run import main
from deepalign.train.trainer import CompletionTrainer


def sgd(self: CompletionTrainer, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
    """In `create_optimizer`'s place: a step changes a parameter by its gradient."""
    self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], self.args.learning_rate)
    return self.optimizer


def constant(
    self: CompletionTrainer, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
) -> torch.optim.lr_scheduler.LRScheduler:
    """In `create_scheduler`'s place."""
    self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer or self.optimizer, factor=1.0)
    return self.lr_scheduler


@contextmanager
def plain_sgd() -> Iterator[None]:
    """SGD with a constant rate."""
    with patch.multiple(CompletionTrainer, create_optimizer=sgd, create_scheduler=constant):
        yield


@contextmanager
def nan_gradient(step: int) -> Iterator[None]:
    """In one step the loss is what it is, and its gradient NaN."""
    real: Callable[..., Any] = CompletionTrainer.compute_loss

    def compute_loss(self: CompletionTrainer, *arguments: Any, **options: Any) -> Any:
        loss = real(self, *arguments, **options)
        if self.state.global_step + 1 == step:
            loss = loss + (loss - loss.detach()).abs().sqrt()  # 0, with derivative 0 times infinity
        return loss

    with patch.object(CompletionTrainer, "compute_loss", compute_loss):
        yield


class Interrupted(BaseException):
    """Ends a training where it is, as a kill does: nothing catches it, nothing is tidied up."""


@contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """The training ends without a word once `step` is done."""
    real = CompletionTrainer.training_step

    def training_step(self: CompletionTrainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            raise Interrupted
        return real(self, *arguments, **options)

    with patch.object(CompletionTrainer, "training_step", training_step):
        try:
            yield
        except Interrupted:
            return
    raise AssertionError(f"the training ended before step {step + 1}")


PATCHES = {"sgd": plain_sgd, "nan_gradient": nan_gradient, "interrupted_after": interrupted_after}


def run_job(words: list[str], patches: dict[str, Any]) -> int:
    """One training; 0 also where it was interrupted on purpose."""
    with ExitStack() as stack:
        for name, argument in patches.items():
            stack.enter_context(PATCHES[name](*([] if argument is None else [argument])))
        return main(words)
    return 0


def run_list(jobs: Path) -> None:
    """All trainings of a file."""
    codes = []
    for job in json.loads(jobs.read_text()):
        codes.append(run_job(job["words"], job.get("patches", {})))
        # what is imported, and what a training leaves, stays: looking through it in every one is a third of its time
        gc.freeze()
    if not dist.is_initialized() or dist.get_rank() == 0:
        jobs.with_suffix(".codes").write_text(json.dumps(codes))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run_list(Path(next(word for word in sys.argv[1:] if word.endswith(".json"))))

"""Runs several trainings in one process per rank, one after the other: starting the launcher costs more than they do.

    deepspeed --num_accelerators 2 tests/train/worker.py CELLS.json

CELLS.json holds {"runs": [arguments for deepalign.train.run, ...], "sgd": whether plain SGD replaces AdamW}.
"""

import json
import sys
from pathlib import Path

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


def run_all(path: Path) -> int:
    """Run what the file lists; returns the largest exit code."""
    listed = json.loads(path.read_text())
    if listed.get("sgd"):
        CompletionTrainer.create_optimizer = sgd
        CompletionTrainer.create_scheduler = constant
    return max(main(words) for words in listed["runs"])


if __name__ == "__main__":
    code = run_all(Path(next(word for word in sys.argv[1:] if word.endswith(".json"))))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)

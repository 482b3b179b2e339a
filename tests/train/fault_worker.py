"""run.py, with a fault: `fault_worker.py step|checkpoint|stuck --config ...`.

step: rank 1 kills itself (-9) in step 7, between forward and backward. checkpoint: it does while the checkpoint of step
8 is written. stuck: rank 0 says so in step 14, and waits to be killed.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from deepalign.train.run import main
from deepalign.train.trainer import CompletionTrainer

STUCK = "stuck in step 14"


def deadly_checkpoint(self: CompletionTrainer, output_dir: str) -> Any:
    """In place of the function that writes a rank's random state, late in a checkpoint."""
    if self.args.process_index == 1 and self.state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return save_rng_state(self, output_dir)


def deadly_step(self: CompletionTrainer, *arguments: Any, **options: Any) -> Any:
    """In place of the function that runs the forward."""
    outputs = compute_loss(self, *arguments, **options)
    if self.args.process_index == 1 and self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return outputs


def stuck_step(self: CompletionTrainer, *arguments: Any, **options: Any) -> Any:
    """In place of the function that runs the forward."""
    if self.args.process_index == 0 and self.state.global_step == 13:
        print(STUCK, flush=True)
        time.sleep(600)
    return compute_loss(self, *arguments, **options)


save_rng_state, compute_loss = CompletionTrainer._save_rng_state, CompletionTrainer.compute_loss


def run(moment: str, words: Sequence[str]) -> int:
    """The training, with its fault."""
    if moment == "checkpoint":
        CompletionTrainer._save_rng_state = deadly_checkpoint
    else:
        CompletionTrainer.compute_loss = {"step": deadly_step, "stuck": stuck_step}[moment]
    return main(words)


if __name__ == "__main__":
    moment, *words = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    sys.exit(run(moment, words))

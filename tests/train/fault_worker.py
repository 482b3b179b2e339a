"""run.py, in which rank 1 kills itself (-9): `fault_worker.py checkpoint|step --config ...`.

checkpoint: while the checkpoint of step 8 is written. step: in step 7, between forward and backward.
"""

import os
import signal
import sys
from typing import Any

from deepalign.train.run import main
from deepalign.train.trainer import CompletionTrainer


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


save_rng_state, compute_loss = CompletionTrainer._save_rng_state, CompletionTrainer.compute_loss

if __name__ == "__main__":
    moment, *words = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    if moment == "checkpoint":
        CompletionTrainer._save_rng_state = deadly_checkpoint
    else:
        CompletionTrainer.compute_loss = deadly_step
    sys.exit(main(words))

"""run.py, in which rank 1 kills itself (-9) while the checkpoint of step 8 is written."""

import os
import signal
import sys
from typing import Any

from deepalign.train.run import main
from deepalign.train.trainer import CompletionTrainer


def deadly(self: CompletionTrainer, output_dir: str) -> Any:
    """In place of the function that writes a rank's random state, late in a checkpoint."""
    if self.args.process_index == 1 and self.state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, output_dir)


real = CompletionTrainer._save_rng_state
CompletionTrainer._save_rng_state = deadly

if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--local_rank")]))

"""Runs several trainings in one process per rank, one after the other: starting the launcher costs more than they do.

    deepspeed --num_accelerators 2 tests/train/worker.py CELLS.json

CELLS.json holds a list of argument lists for deepalign.train.run.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from deepalign.train.run import main

if __name__ == "__main__":
    cells_file = next(word for word in sys.argv[1:] if word.endswith(".json"))
    codes = [main(cell) for cell in json.loads(Path(cells_file).read_text())]
    dist.destroy_process_group()
    sys.exit(max(codes))

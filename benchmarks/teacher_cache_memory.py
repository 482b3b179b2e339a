"""Peak memory of a training step through run.py, each kind in a process of its own.

`python -m benchmarks.teacher_cache_memory --out benchmarks/results/teacher-cache-memory.json` trains a pair with the
vocabulary of Llama 3 and a tiny hidden size for two steps. Large blocks are mapped and unmapped on their own
(`allocator.return_memory`), so the highest resident size during the second step is what it held. Two figures: beyond
the imports (weights, optimizer and teachers included), and beyond what is there before the step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks import allocator
from benchmarks.environment import machine
from benchmarks.peak_memory import restart_peak, status_bytes
from benchmarks.training_pair import PairSize, make_pair, write_config
from deepalign.train.config import load_config
from deepalign.train.prepare import prepare

MIB = 2**20
SIZE = PairSize(vocab=128256, hidden=64, layers=2, examples=8, prompt=32, answer=63, batch=4)
EAGER, OURS = "eager logits, online", "linear, cache"
KINDS: dict[str, dict[str, object]] = {
    EAGER: {"loss_form": "logits", "implementation": "reference", "teacher": "online"},
    "fused logits, online": {"loss_form": "logits", "teacher": "online"},
    "linear, online": {"loss_form": "linear", "teacher": "online"},
    OURS: {"loss_form": "linear", "teacher": "cache"},
}


class PeakOfStep(TrainerCallback):
    """Memory before the second step and at its highest."""

    def __init__(self) -> None:
        self.before = self.peak = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.before = restart_peak()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.peak = status_bytes("VmHWM")


def measure(config: Path) -> dict[str, float]:
    """Two steps of a configuration in this process."""
    if not allocator.return_memory():
        raise RuntimeError(f"peak memory needs glibc's own malloc; this process has: {allocator.description()}")
    imports = restart_peak()
    run = prepare(load_config(config))
    callback = PeakOfStep()
    run.trainer.add_callback(callback)
    run.trainer.train()
    return {
        "peak_mib": (callback.peak - imports) / MIB,
        "peak_extra_mib": (callback.peak - callback.before) / MIB,
    }


def compare(folder: Path) -> dict[str, object]:
    """All kinds, a process each."""
    values = make_pair(folder, SIZE) | {"max_steps": 2, "teacher_cache": str(folder / "cache")}
    config = write_config(folder / "cache.yaml", values | {"output_dir": str(folder / "unused")})
    command = [sys.executable, "-m", "deepalign.train.cache_cli", "--config", str(config), "--no-progress"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found = {}
    for number, (name, changes) in enumerate(KINDS.items()):
        config = write_config(folder / f"{number}.yaml", values | changes | {"output_dir": str(folder / str(number))})
        command = [sys.executable, "-m", "benchmarks.teacher_cache_memory", "--measure", str(config)]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        found[name] = json.loads(lines[-1])
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    fields = ("peak_mib", "peak_extra_mib")
    return {
        "pair": asdict(SIZE),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        **machine(),
        "kinds": found,
        "eager_over_ours": {field: found[EAGER][field] / found[OURS][field] for field in fields},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=Path, help="one configuration, in this process")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/teacher-cache-memory.json"))
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found["eager_over_ours"]))


if __name__ == "__main__":
    main()

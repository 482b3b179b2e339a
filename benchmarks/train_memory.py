"""Peak memory of a training step at V = 128256: the linear loss with cached teachers against the eager logits path.

    python -m benchmarks.train_memory --out docs/results/train-memory.json

Every path is a training by run.py's own `prepare` and `train` in a process of its own, on the same random pair of
models and the same data, float32 on a CPU: "eager" with loss_form logits, the reference implementation and two whole
teachers; "linear" with the linear loss and what `deepalign cache-teacher` wrote; "linear_online" with the linear loss
and two whole teachers. The models are tiny in all but their vocabulary, so what is measured is what it costs.

Two figures: what is held between two steps (models, moments, heads), and what one step holds beyond that at its peak
(activations, loss, gradients, the optimizer's temporaries).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks import allocator
from benchmarks.environment import machine, row_environment
from benchmarks.peak_memory import restart_peak, status_bytes
from benchmarks.training_pair import PairSize, make_pair, write_config
from deepalign.data.files import write_text_atomic
from deepalign.train import cache_cli
from deepalign.train.config import load_config
from deepalign.train.prepare import prepare
from deepalign.train.run import train

MIB = 2**20
VOCAB, HIDDEN, STEPS = 128256, 64, 4
# A step has 2 + 2 rows, whose answers are 127 words and their end: 512 answer tokens.
ROWS, ANSWER = 4, 127
PATHS: dict[str, dict[str, object]] = {
    "eager": {"loss_form": "logits", "implementation": "reference", "teacher": "online"},
    "linear_online": {"teacher": "online"},
    "linear": {"teacher": "cache"},
}


def write_inputs(folder: Path, vocab: int) -> None:
    """Models, data, teacher cache, and a configuration per path."""
    size = PairSize(vocab, HIDDEN, layers=1, examples=8, prompt=8, answer=ANSWER, batch=ROWS // 2)
    values = make_pair(folder, size) | {"teacher_cache": str(folder / "cache"), "max_steps": STEPS}
    for path, changes in PATHS.items():
        write_config(folder / f"{path}.yaml", values | changes | {"output_dir": str(folder / path)})
    if cache_cli.main(["--config", str(folder / "linear.yaml"), "--no-progress"]) != 0:
        raise RuntimeError("cache-teacher failed; see its output")


class StepPeak(TrainerCallback):
    """Resident memory before every step, and the highest while it ran."""

    def __init__(self) -> None:
        self.before: list[int] = []
        self.peak: list[int] = []

    def on_step_begin(self, *args: object, **options: object) -> None:
        """The batch is there; gradients of the last step are gone."""
        self.before.append(restart_peak())

    def on_step_end(self, *args: object, **options: object) -> None:
        """Weights are updated, nothing is logged or saved yet."""
        self.peak.append(status_bytes("VmHWM"))


def measure(path: str, folder: Path) -> dict[str, Any]:
    """One row of the results: a training in this process, the largest of all steps but the first."""
    allocator.return_memory()
    config = load_config(folder / f"{path}.yaml")
    imported, peaks = restart_peak(), StepPeak()
    with ExitStack() as held:
        run = prepare(config, held)
        run.trainer.add_callback(peaks)
        train(run)
    lines = (folder / path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    # the first step makes the optimizer's moments, which the others find there
    extra = max(peak - before for peak, before in zip(peaks.peak[1:], peaks.before[1:], strict=True))
    return {
        "operation": "training_step",
        "path": path,
        "answer_tokens": ROWS * (ANSWER + 1),
        **row_environment(config.implementation or "cpu", "cpu"),
        "held_mib": round((peaks.before[-1] - imported) / MIB, 1),
        "peak_extra_mib": round(extra / MIB, 1),
        "losses": [json.loads(line)["loss"] for line in lines],
    }


def measured_paths(vocab: int) -> dict[str, Any]:
    """All paths, each in a process of its own, and the shares that the linear loss with a cache takes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), vocab)
        for path in PATHS:
            command = [sys.executable, "-m", "benchmarks.train_memory", "--path", path, "--folder", folder]
            shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(shown.splitlines()[-1]))
    eager, *_, linear = rows
    step = linear["peak_extra_mib"] / eager["peak_extra_mib"]
    whole = (linear["held_mib"] + linear["peak_extra_mib"]) / (eager["held_mib"] + eager["peak_extra_mib"])
    shares = {"linear_share_of_eager": round(step, 4), "linear_share_with_models": round(whole, 4)}
    return {"machine": machine(), "vocab": vocab, "hidden": HIDDEN, "steps": STEPS, "rows": rows, **shares}


def main(words: Sequence[str] | None = None) -> int:
    """Measure all paths (or, for this script's own use, one)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--path", choices=PATHS, help="train this path in this process")
    parser.add_argument("--folder", type=Path, help="of --path: models, data, cache, configurations")
    options = parser.parse_args(words)
    if options.path is not None:
        print(json.dumps(measure(options.path, options.folder)))
        return 0
    text = json.dumps(measured_paths(options.vocab), indent=1) + "\n"
    if options.out is not None:
        write_text_atomic(options.out, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

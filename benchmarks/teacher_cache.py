"""Ten epochs with online and with cached teachers, each a run of run.py in a process of its own, once.

`python -m benchmarks.teacher_cache --out benchmarks/results/teacher-cache.json` trains a small pair on a CPU. Seconds
are of the training loop (all its steps) and of the whole process, start and loading included; the cache's own time is
counted apart and together.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.environment import machine
from benchmarks.training_pair import PairSize, make_pair, write_config

EPOCHS = 10
SIZE = PairSize(vocab=4096, hidden=256, layers=6, examples=24, prompt=48, answer=63, batch=8)


def timed(words: list[str]) -> float:
    """Seconds of a process of this Python."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def train(folder: Path, values: dict[str, object]) -> dict[str, float]:
    """One training: seconds of the process, of the loop and of a step, and the last loss."""
    output = folder / str(values["teacher"])
    config = write_config(folder / f"{output.name}.yaml", values | {"output_dir": str(output)})
    seconds = timed(["-m", "deepalign.train.run", "--config", str(config)])
    speed = json.loads((output / "run.json").read_text(encoding="utf-8"))["speed"]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "process_s": seconds,
        "steps": len(lines),
        **speed,
        "first_loss": lines[0]["loss"],
        "loss": lines[-1]["loss"],
    }


def compare(folder: Path) -> dict[str, object]:
    """Both trainings and the caching between them."""
    values = make_pair(folder, SIZE) | {"epochs": EPOCHS, "teacher_cache": str(folder / "cache")}
    online = train(folder, values | {"teacher": "online"})
    config = write_config(folder / "cache.yaml", values | {"output_dir": str(folder / "unused")})
    caching = timed(["-m", "deepalign.train.cache_cli", "--config", str(config), "--no-progress"])
    cached = train(folder, values | {"teacher": "cache"})
    size = sum(path.stat().st_size for path in (folder / "cache").glob("*.safetensors"))
    loops = {name: run["steps"] * run["step_seconds"] for name, run in (("online", online), ("cached", cached))}
    return {
        "pair": asdict(SIZE),
        "epochs": EPOCHS,
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        **machine(),
        "online": online,
        "cached": cached,
        "caching_process_s": caching,
        "cache_mib": size / 2**20,
        "speedup": {
            "steps alone": loops["online"] / loops["cached"],
            "processes, caching left out": online["process_s"] / cached["process_s"],
            "processes, caching included": online["process_s"] / (cached["process_s"] + caching),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/teacher-cache.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, ratio in found["speedup"].items():  # type: ignore[attr-defined]
        print(f"{name}: {ratio:.2f}x")


if __name__ == "__main__":
    main()

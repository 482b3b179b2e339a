"""Ten epochs with online and with cached teachers, each a run of run.py in a process of its own, once.

`python -m benchmarks.teacher_cache` trains a small pair on a CPU, with twelve times as many parameters in its layers as
in its head, as a Llama of 8 billion has them. Times are of a step, of the whole command (loading, training, saving),
and of the process with its imports; the caching, once for ten epochs, is left out and included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.environment import machine
from benchmarks.training_pair import PairSize, make_pair, write_config
from deepalign.train import cache_cli, run

EPOCHS = 10
SIZE = PairSize(vocab=2048, hidden=256, layers=8, examples=64, prompt=48, answer=63, batch=8)


def in_a_process(command: str, config: Path) -> dict[str, float]:
    """Seconds of a process, of the command in it once everything is imported, and of the processor in the command."""
    start = time.perf_counter()
    words = [sys.executable, "-m", "benchmarks.teacher_cache", "--command", command, "--config", str(config)]
    lines = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return {"process_s": time.perf_counter() - start, **json.loads(lines[-1])}


def run_command(command: str, config: Path) -> dict[str, float]:
    """Seconds of a command in this process: loading, computing, writing; by the clock and of the processor."""
    main_of = {"train": run.main, "cache": cache_cli.main}[command]
    start, processor = time.perf_counter(), time.process_time()
    if main_of(["--config", str(config)]) != 0:
        raise RuntimeError(f"{command} failed; see its output")
    return {"command_s": time.perf_counter() - start, "command_cpu_s": time.process_time() - processor}


def train(folder: Path, values: dict[str, object]) -> dict[str, float]:
    """One training: seconds, what run.py says of its steps, first and last loss."""
    output = folder / str(values["teacher"])
    config = write_config(folder / f"{output.name}.yaml", values | {"output_dir": str(output)})
    seconds = in_a_process("train", config)
    speed = json.loads((output / "run.json").read_text(encoding="utf-8"))["speed"]
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {**seconds, "steps": len(losses), **speed, "first_loss": losses[0], "last_loss": losses[-1]}


def compare(folder: Path) -> dict[str, object]:
    """Both trainings and the caching between them."""
    values = make_pair(folder, SIZE) | {"epochs": EPOCHS, "teacher_cache": str(folder / "cache")}
    online = train(folder, values | {"teacher": "online"})
    caching = in_a_process("cache", write_config(folder / "c.yaml", values | {"output_dir": str(folder / "none")}))
    cached = train(folder, values | {"teacher": "cache"})
    size = sum(path.stat().st_size for path in (folder / "cache").glob("*.safetensors"))
    speedup = {"a step": online["step_seconds"] / cached["step_seconds"]}
    fields = {"commands": "command_s", "commands, processor time": "command_cpu_s", "processes": "process_s"}
    for name, field in fields.items():
        speedup[f"{name}, caching left out"] = online[field] / cached[field]
        speedup[f"{name}, caching included"] = online[field] / (cached[field] + caching[field])
    return {
        "pair": asdict(SIZE),
        "epochs": EPOCHS,
        "threads": torch.get_num_threads(),
        **machine(),
        "online": online,
        "caching": caching | {"mib": size / 2**20},
        "cached": cached,
        "speedup": speedup,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/teacher-cache.json"))
    parser.add_argument("--command", choices=("train", "cache"), help="one of the commands, in this process")
    parser.add_argument("--config", type=Path, help="of --command")
    options = parser.parse_args()
    if options.command is not None:
        print(json.dumps(run_command(options.command, options.config)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, ratio in found["speedup"].items():  # type: ignore[attr-defined]
        print(f"{name}: {ratio:.2f}x")


if __name__ == "__main__":
    main()

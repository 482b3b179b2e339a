"""Estimates of `--dry_run` against measured training runs on CPU ranks: memory, and time with one rank.

    python -m benchmarks.training_estimate --out benchmarks/results/training_estimate.json     # minutes

Every run is a real one through run.py on a random Llama of some tens of millions of weights. A rank's peak is the
highest resident size while it trains, as the Linux kernel counts it, less that after its imports and its start. Blocks
are returned to the system when they are freed (`allocator.return_memory`), as in benchmarks/peak_memory.py. Times are
compared on one thread, alone: `--only "1 rank"` measures these runs again and leaves the others in the file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig

from benchmarks import allocator
from benchmarks.environment import machine
from benchmarks.peak_memory import restart_peak, status_bytes
from deepalign.data.files import write_jsonl, write_text_atomic
from deepalign.train.config import LoraConfig
from deepalign.train.estimate import Load, ModelSize, Setup, Zero, matmul_rate, memory_parts, step_work
from deepalign.train.launch import cpu_environment, free_port
from deepalign.train.preview import EFFICIENCY

MIB = 2**20
TOLERANCE = 0.12  # of memory
ROWS, TOKENS, STEPS = 2, 256, 4  # rows of each stream per rank
VOCAB, HIDDEN = 8192, 512


@dataclass(frozen=True)
class Run:
    """One measured run."""

    zero: Zero
    ranks: int
    bf16: bool = False
    lora: bool = False
    checkpointing: bool = False
    layers: int = 8

    @property
    def name(self) -> str:
        """One line for people."""
        parts = [self.zero, f"{self.ranks} rank(s)", "bf16" if self.bf16 else "fp32", "LoRA" if self.lora else "full"]
        return ", ".join([*parts, *(["checkpointing"] if self.checkpointing else [])])


RUNS = (
    Run("none", 1),
    Run("none", 1, checkpointing=True),
    Run("none", 1, lora=True),
    Run("zero0", 2),
    Run("zero1", 2),
    Run("zero2", 2),
    Run("zero3", 2),
    Run("zero2", 2, bf16=True),
    Run("zero3", 2, bf16=True),
    Run("zero3", 2, lora=True),
)


def model_config(layers: int) -> LlamaConfig:
    """A Llama whose weights outweigh what the allocator and DeepSpeed's start take."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2 * TOKENS,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )


def estimate(run: Run) -> tuple[dict[str, int], float]:
    """What the dry run says: bytes by part, and operations of a step."""
    config = model_config(run.layers)
    size = ModelSize.of(config, LoraConfig() if run.lora else None)
    setup = Setup(
        run.zero,
        ranks=run.ranks,
        bf16=run.bf16,
        on_gpu=False,
        checkpointing=run.checkpointing,
        teachers=1 if run.lora else 2,
    )
    rows, weighted = 2 * ROWS, 2 * ROWS * (TOKENS - PROMPT)
    work = step_work(config, size, setup, rows * TOKENS, weighted, TOKENS)
    return memory_parts(config, size, setup, Load(rows, TOKENS, weighted)), work.total


# ---- measuring ----

PROMPT = 24  # tokens of each row before its answer


def worker(out: Path, arguments: list[str]) -> int:
    """Train in this process and write its peak."""
    allocator.return_memory()
    import deepspeed  # noqa: F401  its imports are not what a run holds
    from transformers import TrainerCallback

    from deepalign.train.config import load_config
    from deepalign.train.prepare import prepare
    from deepalign.train.run import train

    config = load_config(arguments[1], arguments[2:])
    before, peaks = status_bytes("VmRSS"), []

    class Note(TrainerCallback):
        """Before anything is saved: a checkpoint gathers weights, which is not what a step holds."""

        def on_step_end(self, *args: object, **options: object) -> None:
            peaks.append(status_bytes("VmHWM") - before)

    with ExitStack() as held:
        run = prepare(config, held)
        run.trainer.add_callback(Note())
        rate = matmul_rate(torch.device("cpu"), torch.bfloat16 if config.bf16 else torch.float32)
        restart_peak()  # loading is not training
        train(run)
    rank = os.environ.get("RANK", "0")
    write_text_atomic(
        out / f"peak-{rank}.json", json.dumps({"peak": peaks[-1], "seconds": run.trainer.speed.seconds, "rate": rate})
    )
    return 0


def measure(run: Run, folder: Path) -> list[dict[str, Any]]:
    """What every rank wrote: peak bytes, seconds of its steps, rate of its products."""
    write_inputs(folder, run.layers)
    out = folder / "runs" / run.name.replace(", ", "-").replace(" ", "-")
    config = out.with_suffix(".yaml")
    values = {
        "aligned": str(folder / f"model-{run.layers}"),
        "base": str(folder / f"base-{run.layers}"),
        "harmful_data": str(folder / "rows.jsonl"),
        "utility_data": str(folder / "rows.jsonl"),
        "output_dir": str(out),
        "harmful_batch_size": ROWS * run.ranks,
        "utility_batch_size": ROWS * run.ranks,
        "max_steps": STEPS,
        "save_steps": 1000,
        "distill_on": "both",
        "bf16": run.bf16,
        "gradient_checkpointing": run.checkpointing,
        "deepspeed": None if run.zero == "none" else run.zero,
        "lora": {} if run.lora else None,
        "use_cpu": True,
    }
    write_text_atomic(config, yaml.safe_dump(values))
    out.mkdir(parents=True, exist_ok=True)
    environ = cpu_environment(threads=1) | {"PYTHONPATH": str(Path(__file__).parents[1])}
    module = "benchmarks.training_estimate"
    words = ["--worker", str(out), "--config", str(config)]
    if run.ranks == 1:
        command = [sys.executable, "-m", module, *words]
    else:
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(run.ranks)]
        command += ["--master_port", str(free_port()), "--module", module, *words]
    with (out / "output.log").open("ab") as log:
        subprocess.run(command, env=environ, stdout=log, stderr=log, check=True)
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("peak-*.json"))]


def write_inputs(folder: Path, layers: int) -> None:
    """Random models with a tokenizer of one token a word, and rows of exactly `TOKENS` tokens."""
    if (folder / f"model-{layers}").is_dir():
        return
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "</s>", *(f"w{i}" for i in range(VOCAB - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m.content }} </s> {% endfor %}",
    )
    for seed, name in enumerate(("model", "base")):
        torch.manual_seed(seed)
        LlamaForCausalLM(model_config(layers)).save_pretrained(folder / f"{name}-{layers}")
        fast.save_pretrained(folder / f"{name}-{layers}")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(16):
        ids = torch.randint(3, VOCAB, (TOKENS - 2,), generator=generator).tolist()
        text = [f"w{i - 3}" for i in ids]
        rows.append({"prompt": " ".join(text[: PROMPT - 1]), "completion": " ".join(text[PROMPT - 1 :])})
    write_jsonl(folder / "rows.jsonl", rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--worker", type=Path, default=None, help="train in this process (for this script's own use)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training_estimate.json"))
    parser.add_argument("--only", default="", help="runs whose name contains this")
    options, rest = parser.parse_known_args()
    if options.worker is not None:
        return worker(options.worker, [word for word in rest if not word.startswith("--local_rank")])
    known = json.loads(options.out.read_text(encoding="utf-8"))["runs"] if options.out.is_file() else []
    rows = {row["run"]: row for row in known}
    with tempfile.TemporaryDirectory() as folder:
        for run in RUNS:
            if options.only in run.name:
                rows[run.name] = compared(run, Path(folder))
    result = {"machine": machine(), "tolerance": TOLERANCE, "model": model_config(8).to_diff_dict()}
    result["runs"] = [rows[run.name] for run in RUNS if run.name in rows]
    write_text_atomic(options.out, json.dumps(result, indent=1) + "\n")
    return 0


def compared(run: Run, folder: Path) -> dict[str, Any]:
    """One row of the results."""
    (parts, operations), ranks = estimate(run), measure(run, folder)
    measured = max(rank["peak"] for rank in ranks)
    row = {"run": run.name, "estimated_mib": parts["peak"] / MIB, "measured_mib": measured / MIB}
    line = f"{run.name:<40} {parts['peak'] / MIB:8.0f} {measured / MIB:8.0f} MiB {parts['peak'] / measured:6.2f}"
    if run.ranks == 1:
        seconds, expected = statistics.median(ranks[0]["seconds"][1:]), operations / (EFFICIENCY * ranks[0]["rate"])
        row |= {"estimated_s": expected, "measured_s": seconds, "matmul_gflops": ranks[0]["rate"] / 1e9}
        line += f" {expected:8.2f} {seconds:8.2f} s {expected / seconds:6.2f}"
    print(line, flush=True)
    return row | {"parts_mib": {name: value / MIB for name, value in parts.items()}}


if __name__ == "__main__":
    sys.exit(main())

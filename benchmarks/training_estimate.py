"""Memory estimates of `--dry_run` against measured training runs on CPU ranks.

    python -m benchmarks.training_estimate --out benchmarks/results/training_estimate.json     # minutes

Every run is a real one through run.py on a random Llama of some tens of millions of weights. A rank's peak is the
highest resident size while it trains, as the Linux kernel counts it, less that after its imports and its start. Blocks
are returned to the system when they are freed (`allocator.return_memory`), as in benchmarks/peak_memory.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig

from benchmarks import allocator
from benchmarks.environment import machine
from benchmarks.peak_memory import _status_bytes
from deepalign.data.files import write_text_atomic
from deepalign.train.config import LoraConfig
from deepalign.train.estimate import Load, ModelSize, Setup, Zero, memory_parts
from deepalign.train.launch import free_port

MIB = 2**20
TOLERANCE = 0.15
ROWS, TOKENS, STEPS = 2, 256, 3  # rows of each stream per rank
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


def estimated_bytes(run: Run) -> dict[str, int]:
    """What the dry run says."""
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
    return memory_parts(config, size, setup, Load(2 * ROWS, TOKENS, 2 * ROWS * (TOKENS - PROMPT)))


# ---- measuring ----

PROMPT = 24  # tokens of each row before its answer


def worker(out: Path, arguments: list[str]) -> int:
    """Train in this process and write its peak."""
    if not allocator.return_memory():
        raise RuntimeError(f"peak memory needs glibc's own malloc; this process has: {allocator.description()}")
    import deepspeed  # noqa: F401  its imports are not what a run holds
    from transformers import TrainerCallback

    from deepalign.train.config import load_config
    from deepalign.train.prepare import prepare
    from deepalign.train.run import train

    config = load_config(arguments[1], arguments[2:])
    before, peaks = _status_bytes("VmRSS"), []

    class Note(TrainerCallback):
        """Before anything is saved: a checkpoint gathers weights, which is not what a step holds."""

        def on_step_end(self, *args: object, **options: object) -> None:
            peaks.append(_status_bytes("VmHWM") - before)

    run = prepare(config)
    run.trainer.add_callback(Note())
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the high-water mark starts again: loading is not training
    train(run)
    rank = os.environ.get("RANK", "0")
    write_text_atomic(out / f"peak-{rank}.json", json.dumps({"peak": peaks[-1]}))
    return 0


def measured_bytes(run: Run, folder: Path) -> int:
    """The largest rank's peak."""
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
    beside_python = Path(sys.executable).parent
    environ = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{beside_python}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    module = "benchmarks.training_estimate"
    words = ["--worker", str(out), "--config", str(config)]
    if run.ranks == 1:
        command = [sys.executable, "-m", module, *words]
    else:
        command = [str(beside_python / "deepspeed"), "--num_accelerators", str(run.ranks)]
        command += ["--master_port", str(free_port()), "--module", module, *words]
    with (out / "output.log").open("ab") as log:
        subprocess.run(command, env=environ, stdout=log, stderr=log, check=True)
    return max(json.loads(path.read_text())["peak"] for path in out.glob("peak-*.json"))


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
    write_text_atomic(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--worker", type=Path, default=None, help="train in this process (for this script's own use)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training_estimate.json"))
    parser.add_argument("--only", default="", help="runs whose name contains this")
    options, rest = parser.parse_known_args()
    if options.worker is not None:
        return worker(options.worker, [word for word in rest if not word.startswith("--local_rank")])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for run in RUNS:
            if options.only not in run.name:
                continue
            parts = estimated_bytes(run)
            measured = measured_bytes(run, Path(folder))
            row = {"run": run.name, "estimated_mib": parts["peak"] / MIB, "measured_mib": measured / MIB}
            rows.append(row | {"parts_mib": {name: value / MIB for name, value in parts.items()}})
            ratio = parts["peak"] / measured
            print(f"{run.name:<40} {parts['peak'] / MIB:8.0f} {measured / MIB:8.0f} {ratio:6.2f}", flush=True)
    result = {"machine": machine(), "tolerance": TOLERANCE, "model": model_config(8).to_diff_dict(), "runs": rows}
    write_text_atomic(options.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

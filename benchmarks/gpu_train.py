"""Training a random 1B-shaped Llama through run.py on a GPU: tokens per second and peak memory, linear against eager.

    python -m benchmarks.gpu_train --out benchmarks/results/gpu-train.json      # make gpu-train

Models (V = 128256, the shape of Llama 3.2 1B), tokenizer and data are made up in a temporary folder. Each run is
`deepspeed deepalign/train/run.py` with ZeRO-3 and bf16 as a user starts it; figures are of its run.json. "eager" is
loss_form logits with the reference implementation: the loss as PyTorch computes it without this library. A run that
does not fit is a row that says so. `--device cpu --tiny` runs everything end to end without a GPU, one rank without
the launcher: a test of the script, not a measurement.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.environment import machine
from deepalign.train.launch import RUN, free_port

SHAPE_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
SHAPE_TINY = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SHAPE_TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# Rows per stream and step, on every rank. The eager loss holds about 18 logits-sized tensors: it gets a small one too.
RUNS: tuple[dict[str, Any], ...] = (
    {"name": "linear, 4 + 4 rows", "rows": 4, "loss_form": "linear"},
    {"name": "eager, 4 + 4 rows", "rows": 4, "loss_form": "logits", "implementation": "reference"},
    {"name": "linear, 16 + 16 rows", "rows": 16, "loss_form": "linear"},
    {"name": "eager, 16 + 16 rows", "rows": 16, "loss_form": "logits", "implementation": "reference"},
)


def write_inputs(folder: Path, shape: dict[str, Any], prompt: int, answer: int) -> None:
    """Two random models with a tokenizer of as many words as the vocabulary has, and two data files."""
    special = ["<pad>", "<unk>", "</s>", "<system>", "<user>", "<assistant>"]
    words = [*special, *(f"w{i}" for i in range(shape["vocab_size"] - len(special)))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", chat_template=TEMPLATE
    )
    context = prompt + answer + 16
    for seed, name in enumerate(("aligned", "base")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            **shape,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
            max_position_embeddings=context,
            dtype=torch.bfloat16,
        )
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    for name in ("harmful", "utility"):
        lines = []
        for _ in range(64):
            ids = torch.randint(len(special), len(words), (prompt + answer,), generator=generator).tolist()
            text = [words[i] for i in ids]
            lines.append(json.dumps({"prompt": " ".join(text[:prompt]), "completion": " ".join(text[prompt:])}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(folder: Path, run: dict[str, Any], ranks: int, steps: int, on_cpu: bool) -> dict[str, Any]:
    """One training; its figures, or why there are none."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    values = {
        **{name: str(folder / name) for name in ("aligned", "base")},
        **{f"{name}_data": str(folder / f"{name}.jsonl") for name in ("harmful", "utility")},
        "output_dir": str(out),
        "distill_on": "both",
        "harmful_batch_size": run["rows"] * ranks,
        "utility_batch_size": run["rows"] * ranks,
        "max_steps": steps,
        "save_steps": 10**6,
        "deepspeed": "zero3",
        "world_size": ranks,
        "use_cpu": on_cpu,
        "loss_form": run["loss_form"],
        "implementation": run.get("implementation"),
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PATH": path} | ({"DS_ACCELERATOR": "cpu"} if on_cpu else {})
    command = [sys.executable, str(RUN), "--config", str(config)]
    if not on_cpu or ranks > 1:
        launcher = shutil.which("deepspeed", path=path)
        assert launcher is not None, "the deepspeed launcher is missing: install the package with its train extra"
        count = "--num_accelerators" if on_cpu else "--num_gpus"
        command[:1] = [launcher, count, str(ranks), "--master_port", str(free_port())]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    row = {"run": run["name"], "ranks": ranks, "steps": steps}
    if done.returncode != 0:
        output = done.stdout + done.stderr
        failed = "out of memory" if "out of memory" in output.lower() else output[-2000:]
        return row | {"failed": failed}
    return row | json.loads((out / "run.json").read_text(encoding="utf-8"))["speed"]


def main(words: list[str] | None = None) -> int:
    """Run all trainings one after the other, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--runs", type=int, nargs="*", default=range(len(RUNS)), help="which of the runs, from 0")
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no GPU here; --device cpu --tiny runs the script without one", file=sys.stderr)
        return 2
    shape, prompt, answer = (SHAPE_TINY, 4, 12) if options.tiny else (SHAPE_1B, 64, 448)
    result: dict[str, Any] = {"tiny": options.tiny, "shape": shape, "tokens": prompt + answer, "machine": machine()}
    result["device"] = "cpu" if options.device == "cpu" else torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), shape, prompt, answer)
        result["rows"] = []
        for number in options.runs:
            row = train(Path(name), RUNS[number], options.ranks, options.steps, options.device == "cpu")
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

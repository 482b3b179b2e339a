"""GCG against its naive implementation: the same seed, the same losses step by step, the time of each.

    python -m benchmarks.gcg_speed --out benchmarks/results/gcg-cpu.json

The model has the microworld's shape and tokenizer and random weights: the time of a step does not depend on what a
model has learnt. `loop` runs candidate by candidate; `batched` runs them together, as the fast one does, but whole.
Processor seconds stand beside wall seconds: where others use the machine, they are the steadier ones.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.environment import machine, torch_isa
from benchmarks.gcg_naive import naive_gcg
from deepalign.data.files import write_text_atomic
from deepalign.evaluate.gcg import GcgSettings, optimise_suffix
from deepalign.microworld.tokenizer import build_tokenizer
from deepalign.microworld.world import World, attack_examples

SHAPES = {  # hidden, intermediate, layers, heads, vocabulary (None: the world's)
    "microworld": (96, 192, 3, 4, None),
    "small Llama": (128, 344, 2, 4, 16000),
}


def build(shape: str) -> tuple[LlamaForCausalLM, Any, World]:
    """A random model of a shape, the world's tokenizer, the world."""
    world = World.build(11)
    tokenizer = build_tokenizer(world)
    hidden, intermediate, layers, heads, vocab = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval(), tokenizer, world


def measure(shape: str, steps: int, repeats: int, prompts: int, contestants: list[str]) -> dict[str, Any]:
    """Seconds of each contestant, interleaved, and the largest difference of their losses."""
    model, tokenizer, world = build(shape)
    examples = attack_examples(world, prompts)
    settings = GcgSettings(steps=steps, initial_token=world.materials[0], early_stop=False, target_tokens=20)

    def run(name: str) -> list[float]:
        if name == "fast":
            return optimise_suffix(model, tokenizer, examples, settings, seed=0, progress=False).losses
        batch_size = 1 if name == "loop" else settings.batch_size
        return naive_gcg(model, tokenizer, examples, settings, seed=0, batch_size=batch_size)[0]

    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    losses: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name in contestants:
            started = time.perf_counter(), time.process_time()
            losses[name] = run(name)
            wall[name].append(round(time.perf_counter() - started[0], 3))
            cpu[name].append(round(time.process_time() - started[1], 3))
    differences = {
        name: max(abs(a - b) for a, b in zip(losses[name], losses["fast"], strict=True)) for name in contestants
    }
    return {
        "shape": shape,
        "prompts": prompts,
        "steps": steps,
        "width": settings.width,
        "suffix_tokens": settings.suffix_tokens,
        "target_tokens": settings.target_tokens,
        "seconds": wall,
        "cpu_seconds": cpu,
        "share_of_naive_time": shares(wall),
        "share_of_naive_cpu_time": shares(cpu),
        "largest_loss_difference": differences,
        "losses": [round(loss, 6) for loss in losses["fast"]],
    }


def shares(times: dict[str, list[float]]) -> dict[str, float]:
    """The fast one's median as a share of each contestant's."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: round(medians["fast"] / median, 3) for name, median in medians.items()}


def main() -> None:
    """Run the cases and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cases = [("microworld", 1, options.steps), ("microworld", 2, max(1, options.steps // 2)), ("small Llama", 1, 1)]
    environment = {**machine(), "torch_isa": torch_isa(), "threads": torch.get_num_threads(), "dtype": "float32"}
    rows = []
    for shape, prompts, steps in cases:
        rows.append(measure(shape, steps, options.repeats, prompts, ["loop", "batched", "fast"]))
        print(json.dumps({name: rows[-1][name] for name in rows[-1] if name != "losses"}), flush=True)
        write_text_atomic(options.out, json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

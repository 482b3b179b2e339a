"""GCG against its naive implementation: the same seed, the same losses step by step, the time of each.

    python -m benchmarks.gcg_speed --out benchmarks/results/gcg-cpu.json

The model has the microworld's shape and tokenizer and random weights: the time of a step does not depend on what a
model has learnt. `loop` runs candidate by candidate; `batched` runs them together, as the fast one does, but whole.
"""

import argparse
import json
import statistics
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
    "small Llama": (256, 688, 4, 8, 32000),
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

    def run(name: str) -> tuple[list[float], float]:
        if name == "fast":
            found = optimise_suffix(model, tokenizer, examples, settings, seed=0, progress=False)
            return found.losses, found.seconds
        batch_size = 1 if name == "loop" else settings.batch_size
        losses, _, seconds = naive_gcg(model, tokenizer, examples, settings, seed=0, batch_size=batch_size)
        return losses, seconds

    times: dict[str, list[float]] = {name: [] for name in contestants}
    losses: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name in contestants:
            losses[name], seconds = run(name)
            times[name].append(round(seconds, 3))
    differences = {
        name: max(abs(a - b) for a, b in zip(losses[name], losses["fast"], strict=True)) for name in contestants
    }
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": shape,
        "prompts": prompts,
        "steps": steps,
        "width": settings.width,
        "suffix_tokens": settings.suffix_tokens,
        "target_tokens": settings.target_tokens,
        "seconds": times,
        "share_of_naive_time": {name: round(medians["fast"] / seconds, 3) for name, seconds in medians.items()},
        "largest_loss_difference": differences,
        "losses": [round(loss, 6) for loss in losses["fast"]],
    }


def main() -> None:
    """Run the cases and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cases = [("microworld", 1), ("microworld", 2), ("small Llama", 1)]
    rows = []
    for shape, prompts in cases:
        steps, repeats = (options.steps, options.repeats) if shape == "microworld" else (2, 1)
        rows.append(measure(shape, steps, repeats, prompts, ["loop", "batched", "fast"]))
        print(json.dumps({name: rows[-1][name] for name in rows[-1] if name != "losses"}), flush=True)
    environment = {**machine(), "torch_isa": torch_isa(), "threads": torch.get_num_threads(), "dtype": "float32"}
    write_text_atomic(options.out, json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

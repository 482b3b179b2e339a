"""Scores of one microworld model as a JSON object of numbers: what `deepalign sweep --evaluate` takes.

    deepalign demo --seed 7 --out runs/seven
    deepalign sweep --config runs/seven/seed-7/completed.yaml --out runs/sweep --grid lambda_reg=0.01,0.04 \
        --grid k=3,10 --sort asr_prefill_5 \
        --evaluate "python -m deepalign.microworld.score --seed 7 --model {model} --out {result}"

Settings are chosen on seeds that no result is reported on (CONTRIBUTING.md).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from deepalign.data.files import write_text_atomic
from deepalign.evaluate.prefill import prefill_attack
from deepalign.microworld.judge import RecipeJudge
from deepalign.microworld.tokenizer import build_tokenizer
from deepalign.microworld.utility import evaluate_utility
from deepalign.microworld.world import World, attack_examples
from deepalign.models import load_frozen_model, set_cpu_threads

DEPTHS = (0, 5, 20)


def score(
    model_path: str, seed: int, n: int = 50, max_new_tokens: int = 64, progress: bool = False
) -> dict[str, float]:
    """Rates of one model: per depth of the prefill attack `asr_prefill_D` and `degenerate_prefill_D`, and `utility`.

    Args:
        model_path: folder of a model of the world `seed`.
        seed: of the world.
        n: attacks per depth, and held-out recipes.
        max_new_tokens: cap on an answer.
        progress: show bars.

    Raises:
        ValueError: more attacks than the world has test pairs.
    """
    world = World.build(seed)
    tokenizer, model = build_tokenizer(world), load_frozen_model(model_path, torch.float32)
    scores = {}
    for depth in DEPTHS:
        attack = prefill_attack(
            model,
            tokenizer,
            attack_examples(world, n),
            depth=depth,
            judge=RecipeJudge(world),
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
        scores[f"asr_prefill_{depth}"] = attack.harmful / attack.n
        scores[f"degenerate_prefill_{depth}"] = attack.degenerate / attack.n
    recipes = evaluate_utility(model, tokenizer, world, n=n, progress=progress)["recipes_heldout"]
    return scores | {"utility": recipes["correct"] / recipes["n"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Score a model and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, required=True, help="of the world it was trained in")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--n", type=int, default=50, help="attacks per depth, and held-out recipes")
    options = parser.parse_args(arguments)
    set_cpu_threads()
    write_text_atomic(options.out, json.dumps(score(options.model, options.seed, options.n)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

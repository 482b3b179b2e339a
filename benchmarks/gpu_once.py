"""Every Triton kernel once, with its main options: what compute-sanitizer and ncu look at.

`python -m benchmarks.gpu_once --rows 5 --vocab 4099`; `--device cpu` runs the reference instead, a test of the script.
`--calls` runs those only whose names begin with one of the given words; several shapes in processes side by side fill
Triton's cache in the time of the slowest.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from deepalign import (
    CompletionLossConfig,
    base_favored_tokens,
    contrastive_sample,
    fused_completion_loss,
    position_divergence,
)

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"penalty": "centered_square"},
    {"kl_direction": "teacher_student", "favored_from": "student"},
)
SAMPLES: tuple[dict[str, Any], ...] = (
    {"top_k": 50, "top_p": 0.9},
    {"top_p": 0.9},
    {"min_p": 0.02},
    {"temperature": 0.0},
    {"top_k": 50},
    {},
)


def calls(rows: int, vocab: int, device: str) -> dict[str, Callable[[], object]]:
    """By name: each launches kernels of its own."""
    implementation = "triton" if device == "cuda" else "reference"
    models = [torch.randn(rows, vocab, device=device).mul(4).bfloat16() for _ in range(3)]
    pair = models[1:]
    found: dict[str, Callable[[], object]] = {}
    for kind in KINDS:
        config = CompletionLossConfig(top_k=min(100, vocab), **kind)

        def loss(config: CompletionLossConfig = config, inplace: bool = False) -> None:
            leaf = models[0].clone().requires_grad_()
            output = fused_completion_loss(
                leaf * 1, *pair, config=config, inplace=inplace, implementation=implementation, reduction="sum"
            )
            output.loss.backward()

        found[f"loss {kind}"] = loss
        found[f"loss in place {kind}"] = partial(loss, inplace=True)
    found["forward"] = lambda: fused_completion_loss(models[0], *pair, implementation=implementation)
    found["base_favored_tokens"] = lambda: base_favored_tokens(*pair, implementation=implementation)
    found["position_divergence"] = lambda: position_divergence(*pair, implementation=implementation)
    for chosen in SAMPLES:
        found[f"sample {chosen}"] = partial(
            contrastive_sample, *pair, alpha=0.5, implementation=implementation, **chosen
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run all; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=4099)
    parser.add_argument("--calls", nargs="+", default=[""], help="beginnings of the names of those to run, for all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no GPU here; --device cpu tests the script", file=sys.stderr)
        return 2
    for name, call in calls(options.rows, options.vocab, options.device).items():
        if not name.startswith(tuple(options.calls)):
            continue
        call()
        if options.device == "cuda":
            torch.cuda.synchronize()
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

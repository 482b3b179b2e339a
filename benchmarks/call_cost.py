"""What a call costs besides its rows: public functions and bare ops, on whole vocabularies and on 128 entries, CPU.

`python -m benchmarks.call_cost --out FILE` times each of them right after the eager peer, which had the caches (cold),
then again (warm), in turn, in one process, one thread. The table's differences say where a call's time goes: on 128
entries there is little but the call, and what the public function takes beyond the op is Python's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.utils import get_commit_info
from tqdm import tqdm

from benchmarks import allocator
from benchmarks.cases import Case, sized
from benchmarks.contestants import LossContestants, SamplerContestants
from benchmarks.environment import machine, row_environment
from benchmarks.peers import loss_peers, sampler_peers
from deepalign import CompletionLossConfig
from deepalign.data.files import write_text_atomic
from deepalign.kernels.completion_loss.op import OP_INTO, config_arguments
from deepalign.kernels.contrastive_sample.cpu import OP as SAMPLE_OP

FEW = 128  # entries of a vocabulary on which a call is all there is
AGAIN = 3  # calls after the cold one, the last of which is the warm one
Call = Callable[[], object]


def sampler_calls(rows: int, vocab: int) -> dict[str, Call]:
    """The sampler and its op on (rows, vocab) logits."""
    contestants = SamplerContestants(Case(rows, vocab), alpha=0.5, temperature=0.8, top_k=50, top_p=0.95)
    models, options = (contestants.aligned, contestants.base), (0.5, 0.8, 50, 0.95, 0.0, False, vocab)
    return {
        "contrastive_sample": contestants.library("cpu").call,
        "its op": lambda: SAMPLE_OP(*models, contestants.uniforms, *options),
    }


def loss_calls(rows: int, vocab: int) -> dict[str, Call]:
    """The loss with and without a backward, and its op without one, on (rows, vocab) logits."""
    contestants = LossContestants(Case(rows, vocab))
    models = (contestants.student, contestants.aligned, contestants.base)
    config = config_arguments(CompletionLossConfig())
    training = contestants.library("cpu", "forward_backward")

    def forward_backward() -> None:
        training.prepare()
        training.call()

    return {
        "fused_completion_loss and backward": forward_backward,
        "fused_completion_loss": contestants.library("cpu", "forward").call,
        "its op": lambda: OP_INTO(*models, *contestants.weights, None, *config, vocab, None, False, True),
    }


def cold_and_warm(calls: Mapping[str, Call], disturb: Call, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds, in microseconds, of each call right after `disturb` and after further calls of its own."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in calls}
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        for name, call in calls.items():
            disturb()
            for again in range(1 + AGAIN):
                start = time.perf_counter()
                call()
                took = time.perf_counter() - start
                if again in (0, AGAIN):
                    seconds[name]["warm" if again else "cold"].append(took)
    return {
        name: {f"{state}_us": statistics.median(values) * 1e6 for state, values in both.items()}
        for name, both in seconds.items()
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per call: operation, call, rows, vocab, cold_us, warm_us."""
    sampler, loss = sized(Case(1, 128256)), sized(Case(16, 151936))
    eager_sampler = SamplerContestants(sampler, alpha=0.5, temperature=0.8, top_k=50).peer(sampler_peers()["eager"])
    eager_loss = LossContestants(loss).peer(loss_peers()["eager"], "forward")
    measured = []
    for case, calls_of, eager in ((sampler, sampler_calls, eager_sampler), (loss, loss_calls, eager_loss)):
        by_vocab = {vocab: calls_of(case.rows, vocab) for vocab in (case.vocab, FEW)}
        flat = {(vocab, name): call for vocab, calls in by_vocab.items() for name, call in calls.items()}
        times = cold_and_warm({f"{vocab} {name}": call for (vocab, name), call in flat.items()}, eager.call, rounds)
        measured += [
            {"call": name, "rows": case.rows, "vocab": vocab, **times[f"{vocab} {name}"]} for vocab, name in flat
        ]
    return measured


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'call':36}{'rows':>6}{'vocabulary':>12}{'cold us':>10}{'warm us':>10}"]
    for row in rows:
        lines.append("{call:36}{rows:6d}{vocab:12d}{cold_us:10.1f}{warm_us:10.1f}".format(**row))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--out", type=Path, help="write the rows, the commit, the machine and its versions there, as JSON"
    )
    arguments = parser.parse_args(argv)
    allocator.keep_memory()
    torch.set_num_threads(1)
    rows = measure(arguments.rounds)
    print(table(rows))
    if arguments.out:
        made_with = {"commit_info": get_commit_info(), "machine": machine(), **row_environment("cpu", "cpu")}
        record = {**made_with, "rounds": arguments.rounds, "rows": rows}
        write_text_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

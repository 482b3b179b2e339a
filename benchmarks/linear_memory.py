"""Peak extra memory of one call of the linear loss and of eager PyTorch, each measured in a process of its own.

`python -m benchmarks.linear_memory --contestant linear` prints one JSON object;
`python -m benchmarks.linear_memory --hidden 256 --vocab 4096 --table FILE` writes the tables of docs/linear-loss.md:
measured here for a vocabulary with which eager PyTorch's 65536 tokens take 10 GiB, computed for a GPU and a whole one.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import allocator
from benchmarks.environment import machine, row_environment
from benchmarks.interleaved import Contestant
from benchmarks.linear import FROZEN, LinearCase, LinearContestants
from benchmarks.peak_memory import peak_extra_bytes
from deepalign.data.files import write_text_atomic
from deepalign.kernels.library import cpu_isa
from deepalign.kernels.linear_rows import choose_chunk_rows

OURS, EAGER = ("linear", "linear_64"), ("eager_float32", "eager_rounded")
CONTESTANTS = (*OURS, *EAGER, "chunked_float32", "chunked_rounded")
TABLE = ("eager_float32", "chunked_float32", "linear")
TOKENS = [1024 << n for n in range(7)]
GIB = 2**30
EAGER_LOGITS = 9.5  # measured: "eager_rounded" at 128 x 2048 x 128256


def contestant(name: str, contestants: LinearContestants) -> Contestant:
    return {
        "linear": lambda: contestants.library(),
        "linear_64": lambda: contestants.library(chunk_rows=64),
        "eager_float32": lambda: contestants.eager(float32_logits=True),
        "eager_rounded": lambda: contestants.eager(float32_logits=False),
        "chunked_float32": lambda: contestants.eager(float32_logits=True, rows_at_a_time=128),
        "chunked_rounded": lambda: contestants.eager(float32_logits=False, rows_at_a_time=128),
    }[name]()


def measure(name: str, case: LinearCase) -> dict[str, object]:
    """One row of the results."""
    allocator.return_memory()
    extra = peak_extra_bytes(contestant(name, LinearContestants(case)))
    row = {"operation": "linear_completion_loss", "case": str(case), "mode": "peak_memory"}
    row |= row_environment("cpu" if cpu_isa() else "reference", "cpu")
    return row | {"implementation": name, "peak_extra_mib": extra / 2**20}


def computed_gib(tokens: int, hidden: int = 4096, vocab: int = 128256) -> dict[str, float]:
    """What a GPU holds beyond models, in GiB: frozen head, bfloat16 hidden states, no activations of the models.

    Eager: 9.5 times its float32 logits, as it was measured to hold on a CPU. Chunked: the same for 1024 tokens at a
    time, and dh. Ours: the chunk that is chosen, of which 3.5 float32 logits and dh in float32, the student's head in
    float16, and dh.
    """
    logits, dhidden, head = 4 * vocab, 2 * hidden, 2 * vocab * hidden
    chunk = choose_chunk_rows(tokens, vocab, torch.device("cuda"), 3.5, head)
    return {
        "eager": tokens * (EAGER_LOGITS * logits + dhidden) / GIB,
        "chunked": (min(tokens, 1024) * EAGER_LOGITS * logits + tokens * dhidden) / GIB,
        "ours": (chunk * (3.5 * logits + 4 * hidden) + head + tokens * dhidden) / GIB,
    }


def measured_rows(hidden: int, vocab: int, most_tokens: int) -> list[dict[str, object]]:
    """Peak extra MiB against tokens, every figure measured in a process of its own."""
    rows: list[dict[str, object]] = []
    for tokens in (tokens for tokens in TOKENS if tokens <= most_tokens):
        row: dict[str, object] = {"tokens": tokens, "hidden": hidden, "vocab": vocab, "how": "measured"}
        for name in TABLE:
            row[f"{name}_mib"] = round(in_a_process(name, tokens, hidden, vocab)["peak_extra_mib"], 1)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def computed_rows(hidden: int = 4096, vocab: int = 128256) -> list[dict[str, object]]:
    """GiB on a GPU against tokens, computed by `computed_gib`."""
    return [
        {"tokens": tokens, "hidden": hidden, "vocab": vocab, "how": "computed for a GPU, not measured"}
        | {f"{name}_gib": round(value, 2) for name, value in computed_gib(tokens, hidden, vocab).items()}
        for tokens in TOKENS
    ]


def save_table(path: Path, hidden: int, vocab: int, most_tokens: int) -> None:
    """Both tables as JSON."""
    tables = {"machine": machine(), "cpu": measured_rows(hidden, vocab, most_tokens), "gpu": computed_rows()}
    write_text_atomic(path, json.dumps(tables, indent=1) + "\n")


def in_a_process(name: str, rows: int, hidden: int, vocab: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.linear_memory", f"--contestant={name}"]
    command += [f"--rows={rows}", f"--hidden={hidden}", f"--vocab={vocab}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contestant", choices=CONTESTANTS)
    parser.add_argument("--table", type=Path, help="JSON to write the tables of memory against tokens to")
    parser.add_argument("--most-tokens", type=int, default=TOKENS[-1], help="of the measured table")
    parser.add_argument("--rows", type=int, default=FROZEN.rows)
    parser.add_argument("--hidden", type=int, default=FROZEN.hidden)
    parser.add_argument("--vocab", type=int, default=FROZEN.vocab)
    arguments = parser.parse_args()
    if arguments.table:
        save_table(arguments.table, arguments.hidden, arguments.vocab, arguments.most_tokens)
        return
    if arguments.contestant is None:
        parser.error("--contestant or --table is required")
    case = LinearCase(arguments.rows, arguments.hidden, arguments.vocab)
    print(json.dumps(measure(arguments.contestant, case)))


if __name__ == "__main__":
    main()

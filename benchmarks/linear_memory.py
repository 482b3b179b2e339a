"""Peak extra memory of one call of the linear loss and of eager PyTorch, each measured in a process of its own.

`python -m benchmarks.linear_memory --contestant linear` prints one JSON object;
`python -m benchmarks.linear_memory --table` the table of docs/linear-loss.md: measured here as far as the machine's
memory goes, computed for a GPU from what each holds at once.
"""

import argparse
import json
import subprocess
import sys

from benchmarks import allocator
from benchmarks.environment import row_environment
from benchmarks.interleaved import Contestant
from benchmarks.linear import FROZEN, LinearCase, LinearContestants
from benchmarks.peak_memory import peak_extra_bytes
from deepalign.kernels.library import cpu_isa
from deepalign.kernels.linear_rows import DEVICE_CHUNK_SIZE, ROW_MULTIPLE

OURS, EAGER = ("linear", "linear_64"), ("eager_float32", "eager_rounded")
CONTESTANTS = (*OURS, *EAGER, "chunked_rounded")
TOKENS = [1024 << n for n in range(7)]
GIB = 2**30
EAGER_LOGITS = 9.5  # measured: "eager_rounded" at 128 x 2048 x 128256


def contestant(name: str, contestants: LinearContestants) -> Contestant:
    return {
        "linear": lambda: contestants.library(),
        "linear_64": lambda: contestants.library(chunk_rows=64),
        "eager_float32": lambda: contestants.eager(float32_logits=True),
        "eager_rounded": lambda: contestants.eager(float32_logits=False),
        "chunked_rounded": lambda: contestants.eager(float32_logits=False, rows_at_a_time=128),
    }[name]()


def measure(name: str, case: LinearCase) -> dict[str, object]:
    """One row of the results."""
    if not allocator.return_memory():
        raise RuntimeError(f"peak memory needs glibc's own malloc; this process has: {allocator.description()}")
    extra = peak_extra_bytes(contestant(name, LinearContestants(case)))
    row = {"operation": "linear_completion_loss", "case": str(case), "mode": "peak_memory"}
    row |= row_environment("cpu" if cpu_isa() else "reference", "cpu")
    return row | {"implementation": name, "peak_extra_mib": extra / 2**20}


def computed_gib(tokens: int, hidden: int = 4096, vocab: int = 128256) -> dict[str, float]:
    """What a GPU holds beyond models, in GiB: frozen head, bfloat16 hidden states, no activations of the models.

    Eager: 9.5 times its float32 logits, as it was measured to hold on a CPU. Chunked: the same for 1024 tokens at a
    time, and dh. Ours: the chunk that is chosen, of which 3.5 float32 logits and dh in float32, and dh.
    """
    logits, dhidden = 4 * vocab, 2 * hidden
    most = int(DEVICE_CHUNK_SIZE.budget / (4 * 3.5 * vocab)) // ROW_MULTIPLE * ROW_MULTIPLE
    chunk = min(tokens, max(DEVICE_CHUNK_SIZE.least, min(DEVICE_CHUNK_SIZE.most, most)))
    return {
        "eager": tokens * (EAGER_LOGITS * logits + dhidden) / GIB,
        "chunked": (min(tokens, 1024) * EAGER_LOGITS * logits + tokens * dhidden) / GIB,
        "ours": (chunk * (3.5 * logits + 4 * hidden) + tokens * dhidden) / GIB,
    }


def table(hidden: int, vocab: int, most_rows: dict[str, int]) -> str:
    """Markdown: peak extra MiB measured on the CPU, GiB computed for a GPU."""
    lines = ["| tokens | eager | chunked | ours | GPU: eager | chunked | ours |", "|---|---|---|---|---|---|---|"]
    for tokens in TOKENS:
        measured = []
        for name in ("eager_rounded", "chunked_rounded", "linear"):
            measured.append(
                f"{in_a_process(name, tokens, hidden, vocab)['peak_extra_mib']:.0f}"
                if tokens <= most_rows[name]
                else "-"
            )
        gpu = (f"{value:.1f}" for value in computed_gib(tokens).values())
        lines.append(f"| {tokens} | {' | '.join([*measured, *gpu])} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def in_a_process(name: str, rows: int, hidden: int, vocab: int) -> dict[str, object]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.linear_memory", f"--contestant={name}"]
    command += [f"--rows={rows}", f"--hidden={hidden}", f"--vocab={vocab}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contestant", choices=CONTESTANTS)
    parser.add_argument("--table", action="store_true", help="the table of memory against tokens")
    parser.add_argument("--rows", type=int, default=FROZEN.rows)
    parser.add_argument("--hidden", type=int, default=FROZEN.hidden)
    parser.add_argument("--vocab", type=int, default=FROZEN.vocab)
    arguments = parser.parse_args()
    if arguments.table:
        most = {"eager_rounded": 2048, "chunked_rounded": 8192, "linear": 65536}
        print(table(arguments.hidden, arguments.vocab, most))
        return
    if arguments.contestant is None:
        parser.error("--contestant or --table is required")
    case = LinearCase(arguments.rows, arguments.hidden, arguments.vocab)
    print(json.dumps(measure(arguments.contestant, case)))


if __name__ == "__main__":
    main()

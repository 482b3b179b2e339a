"""Peak extra memory of the completion loss and of its peers, each in a process of its own (`peak_memory.py`)."""

import json
import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import MEMORY_CASES, Case, sized
from benchmarks.contestants import MODES, runnable

PEERS = ("eager", "eager_tuned", "compile", "compile_tuned")
CONTESTANTS = [(name, mode) for name in runnable("completion_loss", "cpu") for mode in MODES]
CONTESTANTS += [(name, mode) for name in PEERS for mode in MODES[:2]]
HEADLINE = [("cpu", mode) for mode in MODES] + [(name, "forward_backward") for name in ("eager", "compile")]
CHOSEN = [pytest.param(*each, marks=() if each in HEADLINE else pytest.mark.full) for each in CONTESTANTS]


@pytest.mark.parametrize(("contestant", "mode"), CHOSEN)
@pytest.mark.parametrize("case", MEMORY_CASES, ids=str)
def test_peak_memory(benchmark: BenchmarkFixture, case: Case, contestant: str, mode: str) -> None:
    case = sized(case)
    options = {"contestant": contestant, "mode": mode, "rows": case.rows, "vocab": case.vocab, "dtype": case.dtype}
    command = [
        sys.executable,
        "-m",
        "benchmarks.peak_memory",
        *(f"--{name}={value}" for name, value in options.items()),
    ]

    def measure() -> str:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    # The time is that of the child process and means nothing; the row is what it printed.
    row = json.loads(benchmark.pedantic(measure, rounds=1))
    assert row["peak_extra_logits"] >= 0
    benchmark.extra_info |= row

"""Time of the linear completion loss beside the bare products of its size, and its peak memory beside eager PyTorch."""

from functools import cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.environment import row_environment
from benchmarks.interleaved import compete
from benchmarks.linear import (
    FROZEN,
    TRAINED,
    BareProducts,
    LinearCase,
    LinearContestants,
    multiplies_bfloat16,
    product_routes,
    sized,
)
from benchmarks.linear_memory import EAGER, OURS, in_a_process
from deepalign.kernels.library import cpu_isa

OPERATION = "linear_completion_loss"
MIN_ROUNDS = 3  # a call takes seconds where processors do not multiply bfloat16
# Calls that take seconds are for the full suite.
SHORT = pytest.mark.full if not multiplies_bfloat16() else ()


@pytest.mark.parametrize(
    "case", [pytest.param(FROZEN, marks=SHORT), pytest.param(TRAINED, marks=pytest.mark.full)], ids=str
)
def test_linear_completion_loss(benchmark: BenchmarkFixture, case: LinearCase) -> None:
    case = sized(case)
    contestants = LinearContestants(case)
    bare = BareProducts(contestants)
    peers = {f"products_{route}": bare.contestant(route) for route in product_routes()}
    benchmark.extra_info |= {"operation": OPERATION, "case": str(case), "mode": "forward_backward"}
    benchmark.extra_info |= row_environment("cpu" if cpu_isa() else "reference", "cpu")
    compete(benchmark, contestants.library(), peers, elements=case.rows * case.vocab, min_rounds=MIN_ROUNDS)


@cache
def eager_peak_mib(name: str, *size: int) -> float:
    """Of a contestant in `EAGER`, with (rows, hidden, vocabulary)."""
    return in_a_process(name, *size)["peak_extra_mib"]


CHOSEN = [pytest.param(name, marks=SHORT if name == OURS[0] else pytest.mark.full) for name in OURS]


@pytest.mark.parametrize("contestant", CHOSEN)
def test_linear_peak_memory(benchmark: BenchmarkFixture, contestant: str) -> None:
    case = sized(FROZEN)
    size = (case.rows, case.hidden, case.vocab)
    names = EAGER if multiplies_bfloat16() else EAGER[:1]  # the second one's linear layers are in bfloat16
    eager = {name: eager_peak_mib(name, *size) for name in names}
    # The time is that of the child process and means nothing; the row is what it printed.
    row = benchmark.pedantic(in_a_process, args=(contestant, *size), rounds=1)
    benchmark.extra_info |= row | {"eager_mib": eager}

"""Time of `base_favored_tokens` and `position_divergence` against their peers."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import PAIR_CASES, Case, sized
from benchmarks.contestants import PAIR_OPERATIONS, PairContestants, runnable
from benchmarks.environment import row_environment
from benchmarks.interleaved import compete
from benchmarks.peers import pair_peers


@pytest.mark.parametrize("implementation", runnable("position_divergence", "cpu"))
@pytest.mark.parametrize("case", PAIR_CASES, ids=str)
@pytest.mark.parametrize("operation", PAIR_OPERATIONS)
def test_position_statistics(benchmark: BenchmarkFixture, operation: str, case: Case, implementation: str) -> None:
    contestants = PairContestants(operation, sized(case))
    peers = {name: contestants.peer(function) for name, function in pair_peers(operation).items()}
    benchmark.extra_info |= {"operation": operation, "case": str(sized(case)), "mode": "forward"}
    benchmark.extra_info |= row_environment(implementation, case.device)
    compete(benchmark, contestants.library(implementation), peers, elements=sized(case).elements)

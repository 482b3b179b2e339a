"""Time of `base_favored_tokens` and `position_divergence` against their peers."""

from functools import partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.accuracy import output_error
from benchmarks.cases import PAIR_CASES, Case, headline, sized
from benchmarks.contestants import PAIR_OPERATIONS, PairContestants, on_cpu
from benchmarks.environment import row_environment, useful_traffic
from benchmarks.interleaved import compete
from benchmarks.peers import pair_peers


@pytest.mark.parametrize("implementation", on_cpu("position_divergence"))
@pytest.mark.parametrize("case", headline(PAIR_CASES))
@pytest.mark.parametrize("operation", PAIR_OPERATIONS)
def test_position_statistics(benchmark: BenchmarkFixture, operation: str, case: Case, implementation: str) -> None:
    contestants = PairContestants(operation, sized(case))
    peers = {name: contestants.peer(function) for name, function in pair_peers(operation).items()}
    benchmark.extra_info |= {"operation": operation, "case": str(sized(case)), "mode": "forward"}
    benchmark.extra_info |= row_environment(implementation, case.device)
    function = PAIR_OPERATIONS[operation]
    exact = partial(function, implementation="reference")
    ours = partial(function, implementation=implementation)
    benchmark.extra_info["error"] = output_error(ours, exact, sized(case))
    benchmark.extra_info["eager_error"] = output_error(pair_peers(operation)["eager"], exact, sized(case))
    compete(benchmark, contestants.library(implementation), peers, elements=sized(case).elements)
    benchmark.extra_info |= useful_traffic(benchmark.extra_info, sized(case), logits_moved=2)

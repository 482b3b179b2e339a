"""Time of the contrastive sampler, with and without filters, against its peers."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import SAMPLER_CASES, Case, sized
from benchmarks.contestants import SamplerContestants, runnable
from benchmarks.environment import row_environment
from benchmarks.interleaved import compete
from benchmarks.peers import sampler_peers

OPERATION = "contrastive_sample"
# top_p alone makes the peers sort the vocabulary; behind top_k it sees k entries.
FILTERS: dict[str, dict[str, float]] = {
    "none": {},
    "top_k": {"top_k": 50},
    "top_k+top_p": {"top_k": 50, "top_p": 0.95},
    "top_p": {"top_p": 0.95},
    "min_p": {"min_p": 0.05},
}


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("implementation", runnable(OPERATION, "cpu"))
@pytest.mark.parametrize("case", SAMPLER_CASES, ids=str)
def test_contrastive_sample(benchmark: BenchmarkFixture, case: Case, implementation: str, filters: str) -> None:
    contestants = SamplerContestants(sized(case), alpha=0.5, temperature=0.8, **FILTERS[filters])
    peers = {name: contestants.peer(sample) for name, sample in sampler_peers().items()}
    benchmark.extra_info |= {"operation": OPERATION, "case": str(sized(case)), "mode": filters}
    benchmark.extra_info |= row_environment(implementation, case.device)
    compete(benchmark, contestants.library(implementation), peers, elements=sized(case).elements)

"""Time of the contrastive sampler, with and without filters, against its peers."""

from functools import partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.accuracy import ROWS, output_error
from benchmarks.cases import SAMPLER_CASES, Case, headline, sized
from benchmarks.contestants import SamplerContestants, on_cpu
from benchmarks.environment import row_environment, useful_traffic
from benchmarks.interleaved import compete
from benchmarks.peers import sampler_peers
from deepalign import contrastive_sample

OPERATION = "contrastive_sample"
# top_p alone makes the peers sort the vocabulary; behind top_k it sees k entries.
FILTERS: dict[str, dict[str, float]] = {
    "none": {},
    "top_k": {"top_k": 50},
    "top_k+top_p": {"top_k": 50, "top_p": 0.95},
    "top_p": {"top_p": 0.95},
    "min_p": {"min_p": 0.05},
}
SHORT = ("top_k", "top_k+top_p", "top_p")


@pytest.mark.parametrize(
    "filters", [pytest.param(name, marks=() if name in SHORT else pytest.mark.full) for name in FILTERS]
)
@pytest.mark.parametrize("implementation", on_cpu(OPERATION))
@pytest.mark.parametrize("case", headline(SAMPLER_CASES))
def test_contrastive_sample(benchmark: BenchmarkFixture, case: Case, implementation: str, filters: str) -> None:
    contestants = SamplerContestants(sized(case), alpha=0.5, temperature=0.8, **FILTERS[filters])
    peers = {name: contestants.peer(sample) for name, sample in sampler_peers().items()}
    benchmark.extra_info |= {"operation": OPERATION, "case": str(sized(case)), "mode": filters}
    benchmark.extra_info |= row_environment(implementation, case.device)
    drawn = partial(contrastive_sample, **contestants.drawing(ROWS))
    exact, ours = (partial(drawn, implementation=name) for name in ("reference", implementation))
    benchmark.extra_info["error"] = output_error(ours, exact, sized(case))
    compete(benchmark, contestants.library(implementation), peers, elements=sized(case).elements)
    benchmark.extra_info |= useful_traffic(benchmark.extra_info, sized(case), logits_moved=2)

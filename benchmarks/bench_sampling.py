"""Contrastive decoding end to end: the sampler against `transformers`' generate with an eager processor; and the share
of a step that is not the models' own forwards."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import SAMPLING_CASES, SAMPLING_GPU_CASES, Case, sized
from benchmarks.contestants import runnable
from benchmarks.environment import row_environment
from benchmarks.interleaved import compete
from benchmarks.sampling_pair import DRAWS, NEW_TOKENS, GenerateContestants, StepContestants

MIN_ROUNDS = 3  # a call draws many tokens and takes seconds
FUSED = [name for name in runnable("contrastive_sample", "cpu") if name != "reference"] or ["reference"]


def compare_answers(benchmark: BenchmarkFixture, case: Case, implementation: str, draw: str) -> None:
    """Tokens per second of whole answers; `elements` are the tokens drawn."""
    contestants = GenerateContestants(case, DRAWS[draw])
    benchmark.extra_info |= {"operation": "sampling_generate", "case": str(case), "mode": draw}
    benchmark.extra_info |= row_environment(implementation, case.device)
    peers = {"generate": contestants.generate(), "generate_tuned": contestants.generate(tuned=True)}
    subject = contestants.library(implementation)
    compete(benchmark, subject, peers, elements=case.rows * NEW_TOKENS, min_rounds=MIN_ROUNDS)
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_s"] = 1e9 / benchmark.extra_info["ns_per_element"]


@pytest.mark.full
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("case", SAMPLING_CASES, ids=str)
def test_sampling_generate(benchmark: BenchmarkFixture, case: Case, implementation: str, draw: str) -> None:
    compare_answers(benchmark, sized(case), implementation, draw)


@pytest.mark.full
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("case", SAMPLING_CASES, ids=str)
def test_sampling_step(benchmark: BenchmarkFixture, case: Case, implementation: str, draw: str) -> None:
    """The draw against the two forwards: a ratio of 33 is a share of 3%."""
    contestants = StepContestants(sized(case), DRAWS[draw])
    benchmark.extra_info |= {"operation": "sampling_step", "case": str(sized(case)), "mode": draw}
    benchmark.extra_info |= row_environment(implementation, case.device)
    peers = {"two_forwards": contestants.two_forwards()}
    compete(benchmark, contestants.library(implementation), peers, elements=sized(case).elements)


@pytest.mark.gpu
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("case", SAMPLING_GPU_CASES, ids=str)
def test_sampling_generate_on_gpu(benchmark: BenchmarkFixture, case: Case, draw: str) -> None:
    """Two models of the shape of Llama 3 8B with random weights, 32 GB in bf16."""
    implementation = next((name for name in runnable("contrastive_sample", "cuda") if name != "reference"), "reference")
    compare_answers(benchmark, sized(case), implementation, draw)

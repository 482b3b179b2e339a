"""Time of the completion loss per case, implementation and mode, against its peers.

`make bench` runs these on the CPU, `make gpu` those marked `gpu`. Every implementation that can run joins by itself.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import GPU_LOSS_CASES, LOSS_CASES, WORST_CASES, Case, sized
from benchmarks.contestants import MODES, LossContestants, runnable
from benchmarks.environment import row_environment
from benchmarks.interleaved import compete
from benchmarks.peers import loss_peers

OPERATION = "completion_loss"


def compare(benchmark: BenchmarkFixture, case: Case, implementation: str, mode: str) -> None:
    """One row of the results. Forward only also competes with the same implementation's forward + backward."""
    contestants = LossContestants(sized(case))
    peers = {name: contestants.peer(loss, mode) for name, loss in loss_peers().items()}
    if mode == "forward":
        peers["forward_backward"] = contestants.library(implementation, "forward_backward")
    benchmark.extra_info |= {"operation": OPERATION, "case": str(sized(case)), "mode": mode}
    benchmark.extra_info |= row_environment(implementation, case.device)
    compete(benchmark, contestants.library(implementation, mode), peers, elements=sized(case).elements)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", runnable(OPERATION, "cpu"))
@pytest.mark.parametrize("case", LOSS_CASES, ids=str)
def test_completion_loss(benchmark: BenchmarkFixture, case: Case, implementation: str, mode: str) -> None:
    compare(benchmark, case, implementation, mode)


@pytest.mark.parametrize("implementation", runnable(OPERATION, "cpu"))
@pytest.mark.parametrize("case", WORST_CASES, ids=str)
def test_completion_loss_at_worst(benchmark: BenchmarkFixture, case: Case, implementation: str) -> None:
    compare(benchmark, case, implementation, "forward_backward")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", runnable(OPERATION, "cuda"))
@pytest.mark.parametrize("case", GPU_LOSS_CASES, ids=str)
def test_completion_loss_on_gpu(benchmark: BenchmarkFixture, case: Case, implementation: str, mode: str) -> None:
    compare(benchmark, case, implementation, mode)

"""Time of the completion loss per case, implementation and mode, against its peers.

`make bench` runs these on the CPU, `make gpu` those marked `gpu`. Every implementation that can run joins by itself.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.accuracy import library_loss, loss_error
from benchmarks.cases import GPU_LOSS_CASES, LOSS_CASES, WORST_CASES, Case, headline, sized
from benchmarks.contestants import MODES, LossContestants, on_cpu, runnable
from benchmarks.environment import row_environment, useful_traffic
from benchmarks.interleaved import compete
from benchmarks.peers import loss_peers

OPERATION = "completion_loss"
# each input read, a gradient written
LOGITS_MOVED = {"forward": 3, "forward_backward": 4, "forward_backward_inplace": 4}
SHORT_MODES = [pytest.param(mode, marks=pytest.mark.full if "inplace" in mode else ()) for mode in MODES]


def compare(benchmark: BenchmarkFixture, case: Case, implementation: str, mode: str) -> None:
    """One row of the results. Forward only also competes with the same implementation's forward + backward."""
    contestants = LossContestants(sized(case))
    peers = {name: contestants.peer(loss, mode) for name, loss in loss_peers().items()}
    if mode == "forward":
        peers["forward_backward"] = contestants.library(implementation, "forward_backward")
    benchmark.extra_info |= {"operation": OPERATION, "case": str(sized(case)), "mode": mode}
    benchmark.extra_info |= row_environment(implementation, case.device)
    benchmark.extra_info["error"] = loss_error(sized(case), library_loss(implementation))
    eager = loss_peers()["eager"]
    benchmark.extra_info["eager_error"] = loss_error(sized(case), lambda *inputs: eager(*inputs).loss)
    compete(benchmark, contestants.library(implementation, mode), peers, elements=sized(case).elements)
    benchmark.extra_info |= useful_traffic(benchmark.extra_info, sized(case), LOGITS_MOVED[mode])


@pytest.mark.parametrize("mode", SHORT_MODES)
@pytest.mark.parametrize("implementation", on_cpu(OPERATION))
@pytest.mark.parametrize("case", headline(LOSS_CASES))
def test_completion_loss(benchmark: BenchmarkFixture, case: Case, implementation: str, mode: str) -> None:
    compare(benchmark, case, implementation, mode)


@pytest.mark.full
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

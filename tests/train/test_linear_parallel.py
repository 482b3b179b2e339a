"""The linear loss where parameters are sharded: inside their module's forward as in one process, refused outside."""

import pytest
import torch

from tests.train import documented_fsdp
from tests.train.forked import fork_ranks, join
from tests.train.linear_worker import CELLS, one_process, run_cells

pytestmark = pytest.mark.timeout(900)  # the first launch on a machine compiles DeepSpeed's communication ops


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("linear")
    log = folder / "log"
    join(fork_ranks(run_cells, [folder / "found.pt"], log), log)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize(("tied", "recompute"), CELLS)
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_a_step_on_two_ranks_is_that_of_one_process(found: dict, kind: str, tied: bool, recompute: bool) -> None:
    expected = one_process(tied, recompute)
    trained = found[f"{kind}-{tied}-{recompute}"]
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_the_documented_fsdp2_code_takes_the_step_of_one_process(found: dict, tied: bool) -> None:
    """A Llama, sharded layer by layer; ranks with different numbers of answer tokens."""
    expected, start = documented_fsdp.one_process(tied), documented_fsdp.model(2, tied)
    trained = found[f"documented-{tied}"]
    assert trained.keys() == expected.keys() == {f"model.{name}" for name, _ in start.named_parameters()}
    for name, value in start.named_parameters():
        assert not torch.equal(expected[f"model.{name}"], value), f"{name} was not trained"
        torch.testing.assert_close(trained[f"model.{name}"], expected[f"model.{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "message"), [("fsdp2", "is a DTensor"), ("zero3", "partitioned by ZeRO-3")])
def test_a_head_that_is_not_whole_is_refused(found: dict, kind: str, message: str) -> None:
    assert message in found["refusals"][kind]

"""A step whose loss or gradient is not finite: skipped with its rows named, or the training stops; on every rank."""

import json

import pytest
import torch

from deepalign.train.run import main
from tests.train.jobs import NAN, NAN_GRADIENT_STEP, STAGES, exit_codes, weights, write_poisoned
from tests.train.test_parallel import assert_same_course
from tests.train.tiny_run import TinyRun, read_metrics
from tests.train.worker import nan_gradient

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return write_poisoned(tmp_path_factory.mktemp("poisoned"))


@pytest.fixture(scope="module")
def alone(poisoned, tmp_path_factory):
    """The same training in one process, without DeepSpeed."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(["--config", str(poisoned.config(out, **NAN))]) == 0
    return out


@pytest.fixture(scope="module")
def alone_with_a_nan_gradient(poisoned, tmp_path_factory):
    """The same, and in a step between the poisoned ones only the gradient is NaN: the training of the ranks."""
    out = tmp_path_factory.mktemp("alone_with_a_nan_gradient") / "out"
    with nan_gradient(NAN_GRADIENT_STEP):
        assert main(["--config", str(poisoned.config(out, **NAN))]) == 0
    return out


def skipped(out):
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def assert_only_skipped_steps_left_the_weights(out, bad_steps):
    """Checkpoints are written after every step."""
    before = None
    for step in range(1, NAN["max_steps"] + 1):
        after = weights(out / f"checkpoint-{step}")
        assert all(torch.isfinite(value).all() for value in after.values())
        if before is not None:
            same = all(torch.equal(after[name], before[name]) for name in before)
            assert same == (step in bad_steps), step
        before = after


def test_a_row_with_a_nan_loss_is_skipped_and_named(alone):
    lines = skipped(alone)
    assert lines, "the poisoned row was not among the rows of these steps"
    assert all(line["rows"] == ["harmful row 7"] and line["reason"] == "loss" for line in lines)
    assert_only_skipped_steps_left_the_weights(alone, {line["step"] for line in lines})
    bad = {line["step"] for line in lines}
    metrics = {line["step"]: line for line in read_metrics(alone)}
    assert sorted(metrics) == [1, 2, 3, 4, 5]
    for step, line in metrics.items():
        assert ("skipped_steps" in line) == (step in bad)
        assert ("kl" in line) == (step not in bad)
        assert "NaN" not in json.dumps(line)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_skip_the_same_steps_under_every_stage(ran, alone, alone_with_a_nan_gradient, stage):
    out = ran / f"nan-{stage}"
    assert [line for line in skipped(out) if line["reason"] == "loss"] == skipped(alone)
    assert skipped(out) == skipped(alone_with_a_nan_gradient)
    taken = [[line for line in read_metrics(f) if "kl" in line] for f in (out, alone_with_a_nan_gradient)]
    assert_same_course(*taken)
    assert [line["learning_rate"] for line in taken[0]] == [line["learning_rate"] for line in taken[1]]
    assert_only_skipped_steps_left_the_weights(out, {line["step"] for line in skipped(out)})


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_gradient_of_a_finite_loss_is_skipped_too(ran, stage):
    lines = [line for line in skipped(ran / f"nan-{stage}") if line["reason"] != "loss"]
    assert [(line["step"], line["reason"]) for line in lines] == [(NAN_GRADIENT_STEP, "gradient")]
    assert len(lines[0]["rows"]) == 10, "all rows of the step are named, of both ranks; two of the twelve came twice"


def test_on_nan_stop_ends_the_training_with_one_message(poisoned, tmp_path, capsys, alone):
    config = poisoned.config(tmp_path / "out", **NAN | {"on_nan": "stop"})
    first_bad = skipped(alone)[0]["step"]
    for _ in range(2):  # starting again says the same: nothing but the row's data or the settings can change it
        assert main(["--config", str(config)]) == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert f"step {first_bad}: the loss is not finite (harmful row 7)" in errors[0]
    assert not (tmp_path / "out" / "final").exists()
    # with on_nan: skip the same run goes on from its last checkpoint
    assert main(["--config", str(config), "--on_nan", "skip"]) == 0
    assert read_metrics(tmp_path / "out") == read_metrics(alone)


def test_on_nan_stop_ends_every_rank(ran):
    assert exit_codes(ran, 2)["nan-stop"] == 1
    log = (ran / "log-2").read_text()
    for rank in (0, 1):
        assert f"error: rank {rank}: step" in log
    assert not (ran / "nan-stop" / "final").exists()

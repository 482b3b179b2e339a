"""The same losses on any number of ranks, ZeRO stage and accumulation; a run killed and resumed is the same run."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepalign.train.run import main
from tests.train.conftest import TinyRun, read_metrics
from tests.train.launch import RUN, finish, kill, launch

pytestmark = pytest.mark.timeout(900)  # the first launch on a machine compiles DeepSpeed's communication ops

STAGES = ("zero0", "zero2", "zero3", None)  # None: torch's DDP, without DeepSpeed
ACCUMULATION = (1, 2)
# clipping must be at work to be compared: gradients of the tiny run have norms of 0.3 to 1
CHANGES = {"max_steps": 6, "max_grad_norm": 0.2, "learning_rate": 3e-3, "save_steps": 100}
LONG = {"max_steps": 24, "save_steps": 4, "harmful_batch_size": 8, "seed": 5, "deepspeed": "zero2", "world_size": 2}


@pytest.fixture(scope="module")
def two_rank_runs(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the two-rank trainings of this file, in one launch: a folder with one output folder per cell."""
    folder = tmp_path_factory.mktemp("two_ranks")
    configs = [tiny_run.config(folder / "uninterrupted", **LONG)]
    for stage in STAGES:
        for steps in ACCUMULATION:
            changes = CHANGES | {"deepspeed": stage, "gradient_accumulation_steps": steps, "world_size": 2}
            configs.append(tiny_run.config(folder / f"{stage}-{steps}", **changes))
    cells = [["--config", str(config)] for config in configs]
    (folder / "cells.json").write_text(json.dumps({"runs": cells}))
    log = folder / "log"
    finish(launch([Path(__file__).with_name("worker.py"), folder / "cells.json"], log), log)
    return folder


@pytest.fixture(scope="module")
def one_process_run(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("one_process")
    assert main(["--config", str(tiny_run.config(folder / "out", **CHANGES))]) == 0
    return read_metrics(folder / "out")


def assert_same_course(metrics, expected, tolerance=1e-5):
    assert [line["step"] for line in metrics] == [line["step"] for line in expected]
    for line, other in zip(metrics, expected, strict=True):
        for name in ("loss", "kl", "completion", "alpha", "mean_logit", "base_favored_count"):
            assert line[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (line["step"], name)


@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_give_the_losses_of_one_process(two_rank_runs, one_process_run, stage, accumulation):
    assert_same_course(read_metrics(two_rank_runs / f"{stage}-{accumulation}"), one_process_run)


def test_accumulation_in_one_process_gives_the_same_losses(tiny_run, tmp_path, one_process_run):
    config = tiny_run.config(tmp_path / "out", **CHANGES, gradient_accumulation_steps=2)
    assert main(["--config", str(config)]) == 0
    assert_same_course(read_metrics(tmp_path / "out"), one_process_run)


def test_clipping_is_at_work_in_the_runs_compared(one_process_run):
    assert all(line["grad_norm"] > CHANGES["max_grad_norm"] for line in one_process_run)


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_the_final_folder_loads_and_holds_the_trained_student(tiny_run, two_rank_runs, stage):
    final = two_rank_runs / f"{stage}-1" / "final"
    trained = AutoModelForCausalLM.from_pretrained(final)
    start = AutoModelForCausalLM.from_pretrained(tiny_run.aligned).state_dict()
    reference = load_file(two_rank_runs / "zero0-1" / "final" / "model.safetensors")
    moved = 0.0
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, reference[name], rtol=1e-4, atol=1e-5)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3
    assert AutoTokenizer.from_pretrained(final).get_vocab() == AutoTokenizer.from_pretrained(tiny_run.base).get_vocab()


def test_a_killed_run_resumes_as_if_never_interrupted(tiny_run, two_rank_runs, tmp_path):
    """kill -9 of every process after a checkpoint; the resumed run's metrics and weights are equal bit for bit."""
    out, log = tmp_path / "out", tmp_path / "log"
    config = tiny_run.config(out, **LONG)
    process = launch([RUN, "--config", config], log)
    wait_for(lambda: (out / "checkpoint-4").is_dir(), process, log)
    kill(process)
    assert not (out / "final").exists(), "the run ended before it could be killed: give it more steps"
    # what a kill during a checkpoint, or between a metrics line and its checkpoint, leaves behind
    (out / ".incomplete" / "checkpoint-8").mkdir(parents=True, exist_ok=True)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 23, "loss": 99.0}\n{"step": 2')

    resumed = finish(launch(["--module", "deepalign.train.run", "--config", config], log), log)
    assert "refused" not in resumed
    assert read_metrics(out) == read_metrics(two_rank_runs / "uninterrupted")
    weights = load_file(out / "final" / "model.safetensors")
    for name, value in load_file(two_rank_runs / "uninterrupted" / "final" / "model.safetensors").items():
        assert torch.equal(weights[name], value), name
    assert not (out / ".incomplete").exists()


def wait_for(condition, process, log: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, f"nothing after {seconds} s:\n{log.read_text()[-4000:]}"
        time.sleep(0.02)

"""The same training on any number of ranks, ZeRO stage and accumulation; one that goes on is the same training."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepalign.train.run import main
from tests.train.jobs import CLIPPED, CLIPPED_CELLS, RESUMED_CELLS, exit_codes, weights
from tests.train.tiny_run import TinyRun, read_metrics

pytestmark = pytest.mark.timeout(900)  # the first launch on a machine compiles DeepSpeed's communication ops


@pytest.fixture(scope="module")
def one_process_run(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("one_process")
    assert main(["--config", str(tiny_run.config(folder / "out", **CLIPPED))]) == 0
    return read_metrics(folder / "out")


def assert_same_course(metrics, expected, tolerance=1e-5):
    assert [line["step"] for line in metrics] == [line["step"] for line in expected]
    for line, other in zip(metrics, expected, strict=True):
        for name in ("loss", "kl", "completion", "alpha", "mean_logit", "base_favored_count"):
            assert line[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (line["step"], name)


@pytest.mark.parametrize(("stage", "accumulation"), CLIPPED_CELLS)
def test_two_ranks_with_adam_and_clipping_give_the_losses_of_one_process(ran, one_process_run, stage, accumulation):
    """The optimizer of run.py, with clipping at work; gradients themselves are compared in test_matrix.py."""
    assert_same_course(read_metrics(ran / f"clipped-{stage}-{accumulation}"), one_process_run)


def test_accumulation_in_one_process_gives_the_same_losses(tiny_run, tmp_path, one_process_run):
    config = tiny_run.config(tmp_path / "out", **CLIPPED, gradient_accumulation_steps=2)
    assert main(["--config", str(config)]) == 0
    assert_same_course(read_metrics(tmp_path / "out"), one_process_run)


def test_clipping_is_at_work_in_the_runs_compared(one_process_run):
    assert all(line["grad_norm"] > CLIPPED["max_grad_norm"] for line in one_process_run)


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_offloading_changes_where_the_optimizer_is_not_what_it_does(ran, one_process_run, name):
    assert_same_course(read_metrics(ran / f"run-{name}"), one_process_run)


def test_a_deepspeed_file_that_contradicts_the_configuration_is_refused(ran):
    assert exit_codes(ran, 1)["refused"] == 2
    assert "contradicting.json: " in (log := (ran / "log-1").read_text())
    assert "ds gradient_clipping=1.0 vs hf max_grad_norm=0.2" in log


@pytest.mark.parametrize("name", ["bf16-zero3", "bf16-zero3-lora"])
def test_bf16_with_gradient_checkpointing_trains(ran, one_process_run, name):
    """Near the float32 run at its first step (LoRA starts from the same model), and trained after it."""
    metrics = read_metrics(ran / name)
    for term in ("loss", "kl", "completion"):
        assert metrics[0][term] == pytest.approx(one_process_run[0][term], rel=0.03)
    assert metrics[-1]["loss"] != metrics[0]["loss"]


@pytest.mark.parametrize("name", ["clipped-None-1", "clipped-zero2-2", "clipped-zero3-1"])
def test_the_final_folder_loads_and_holds_the_trained_student(tiny_run, ran, name):
    final = ran / name / "final"
    trained = AutoModelForCausalLM.from_pretrained(final)
    start = AutoModelForCausalLM.from_pretrained(tiny_run.aligned).state_dict()
    reference = weights(ran / "clipped-None-1" / "final")
    moved = 0.0
    for key, value in trained.state_dict().items():
        torch.testing.assert_close(value, reference[key], rtol=1e-4, atol=1e-5)
        moved = max(moved, float((value - start[key]).abs().max()))
    assert moved > 1e-3
    assert AutoTokenizer.from_pretrained(final).get_vocab() == AutoTokenizer.from_pretrained(tiny_run.base).get_vocab()


@pytest.mark.parametrize("name", RESUMED_CELLS)
def test_a_resumed_run_is_the_run_that_was_never_interrupted(ran, name):
    """Bit for bit, with accumulation; with LoRA also the random numbers of its dropout."""
    assert exit_codes(ran, 2)[f"resumed-{name}"] == 0
    assert read_metrics(ran / f"resumed-{name}") == read_metrics(ran / f"whole-{name}")
    resumed = weights(ran / f"resumed-{name}" / "final")
    for key, value in weights(ran / f"whole-{name}" / "final").items():
        assert torch.equal(resumed[key], value), key
    assert ("lora" in name) == any("lora_A" in key for key in resumed)

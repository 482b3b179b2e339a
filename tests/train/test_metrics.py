"""Metrics of steps, the warning about the mean logit, trackers, the model card."""

import json
import math

import pytest
import torch
import yaml

from deepalign.output_head import OutputHead
from deepalign.train.completion_forward import SUMS, mean_logit
from deepalign.train.metrics import DriftWarning, Speed, StepMetrics
from deepalign.train.run import main
from tests.train.tiny_run import TinyRun, read_metrics


def sums(**values):
    return torch.tensor([float(values.get(name, 0)) for name in SUMS], dtype=torch.float64)


def test_terms_are_per_step_and_the_rest_per_row_of_the_steps_taken():
    metrics = StepMetrics(world_size=1, device=torch.device("cpu"))
    for micro_batch in (sums(kl=1, alpha=4, rows=2), sums(kl=2, completion=3, alpha=5, rows=1)):
        metrics.add(micro_batch)
    metrics.end_step(taken=True)
    metrics.add(sums(kl=math.nan, rows=7))
    metrics.end_step(taken=False)
    metrics.add(sums(kl=1, alpha=3, rows=3))
    metrics.end_step(taken=True)
    drained = metrics.drain()
    assert drained["kl"] == 2
    assert drained["completion"] == 1.5
    assert drained["loss"] == 3.5
    assert drained["alpha"] == 2
    assert metrics.drain() == {}


def test_the_mean_logit_is_that_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, lm_head = torch.randn(5, 8, generator=generator), torch.randn(20000, 8, generator=generator) + 0.3
    head = OutputHead(lm_head, logit_scale=0.5)
    expected = head.logits(hidden)[:, :19990].double().mean(dim=1)
    torch.testing.assert_close(mean_logit(hidden, head, 19990).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_drift_warning_is_given_once_each_time_the_distance_has_grown_by_as_much():
    warning = DriftWarning(2.0)
    said = [
        warning.message({"mean_logit": value, "aligned_mean_logit": 1.0}) for value in (1, 0, -1.5, -1.6, -2.5, -4, 1)
    ]
    assert [message is not None for message in said] == [False, False, True, False, False, True, False]
    assert "-2.50 from the aligned model's" in said[2]
    assert "centered_square" in said[2]
    assert DriftWarning(None).message({"mean_logit": 99.0, "aligned_mean_logit": 0.0}) is None
    assert DriftWarning(2.0).message({"loss": 1.0}) is None


def test_a_drifting_run_is_warned_about(tiny_run: TinyRun, tmp_path, capsys):
    """The student starts as the base model, whose mean logit is not the aligned model's."""
    config = tiny_run.config(tmp_path / "out", student=str(tiny_run.base), max_steps=2, mean_logit_drift=1e-3)
    assert main(["--config", str(config)]) == 0
    line = read_metrics(tmp_path / "out")[0]
    assert abs(line["mean_logit"] - line["aligned_mean_logit"]) > 1e-3
    assert capsys.readouterr().out.count("the student's mean logit is") == 1


@pytest.mark.parametrize("form", ["linear", "logits"])
def test_both_forms_report_the_same(tiny_run: TinyRun, tmp_path, form):
    config = tiny_run.config(tmp_path / form, loss_form=form, max_steps=1)
    assert main(["--config", str(config)]) == 0
    other = tiny_run.config(tmp_path / "reference", loss_form="logits", implementation="reference", max_steps=1)
    assert main(["--config", str(other)]) == 0
    (ours,), (expected,) = read_metrics(tmp_path / form), read_metrics(tmp_path / "reference")
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_tensorboard_gets_every_metric(tiny_run: TinyRun, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    config = tiny_run.config(tmp_path / "out", max_steps=3, report_to="tensorboard")
    assert main(["--config", str(config)]) == 0
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ("loss", "kl", "completion", "base_favored_count", "mean_logit", "grad_norm"):
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([line[name] for line in read_metrics(tmp_path / "out")], rel=1e-5)


@pytest.mark.parametrize(("name", "problem"), [("wandb", "wandb is missing"), ("mlflow", "expected none, tensorboard")])
def test_a_tracker_that_is_not_there_is_refused(tiny_run: TinyRun, tmp_path, capsys, monkeypatch, name, problem):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--config", str(tiny_run.config(tmp_path / "out", report_to=name))]) == 2
    assert problem in capsys.readouterr().err


def test_every_save_has_a_card_with_what_a_reader_needs(tiny_run: TinyRun, tmp_path):
    out = tmp_path / "out"
    assert main(["--config", str(tiny_run.config(out, max_steps=3, save_steps=2))]) == 0
    for name, step in (("checkpoint-2", 2), ("checkpoint-3", 3), ("final", 3)):
        card = (out / name / "README.md").read_text()
        header = yaml.safe_load(card.split("---")[1])
        assert header["base_model"] == str(tiny_run.aligned)
        assert header["library_name"] == "transformers"
        assert f"step {step} of 1 rank(s)" in card
        assert f"| base teacher | `{tiny_run.base}` |" in card
        assert "| harmful | `harmful.jsonl` | 10 |" in card
        assert "lambda_reg: 0.01" in card
        assert f"torch {torch.__version__}" in card
        loss = read_metrics(out)[step - 1]["loss"]
        assert f"- loss: {loss:.6g}" in card


def test_speed_leaves_out_padding_and_the_first_two_steps():
    speed = Speed(world_size=3)
    assert speed.summary() == {}
    padded = {"input_ids": torch.zeros(2, 5), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])}
    packed = {"input_ids": torch.zeros(1, 7)}
    for seconds, batches in ((90.0, [padded]), (80.0, [padded]), (1.0, [padded, packed]), (2.0, [packed]), (5.0, [])):
        speed.tokens.append(0)
        for batch in batches:
            speed.saw(batch)
        speed.seconds.append(seconds)
    found = speed.summary()
    assert found["step_seconds"] == 2.0
    assert found["tokens_per_second"] == 3 * (5 + 7 + 7) / (1 + 2 + 5)


def test_the_summary_has_the_speed(tiny_run: TinyRun, tmp_path):
    assert main(["--config", str(tiny_run.config(tmp_path / "out", max_steps=4))]) == 0
    speed = json.loads((tmp_path / "out" / "run.json").read_text())["speed"]
    assert speed["step_seconds"] > 0
    assert speed["tokens_per_second"] > 0
    assert speed["peak_memory_mib"] > 50

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from deepalign.defenses import training
from deepalign.defenses.artifacts import make_once
from deepalign.defenses.lora import LoraSettings, attach_lora
from deepalign.defenses.training import AnswerTrainer, SftSettings, mean_answer_loss, train_on_answers
from tests.defenses.conftest import make_family_model


def test_the_mean_answer_loss_is_over_answer_tokens(llama, tokenizer, examples):
    losses = []
    with torch.no_grad():
        for example in examples:
            log_p = llama(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
            places = range(example.response_start, len(example.input_ids))
            losses += [-float(log_p[place - 1, example.input_ids[place]]) for place in places]
    expected = sum(losses) / len(losses)
    for batch_size in (1, 4, 100):
        assert mean_answer_loss(llama, tokenizer, examples, batch_size) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        mean_answer_loss(llama, tokenizer, [])


def test_accumulated_micro_batches_are_one_batch(tokenizer, examples, tmp_path):
    weights = []
    for accumulation in (1, 2):
        model = make_family_model("llama")
        settings = SftSettings(batch_size=4, gradient_accumulation_steps=accumulation, max_steps=3, learning_rate=1e-2)
        train_on_answers(model, tokenizer, examples, settings, tmp_path / str(accumulation), progress=False)
        weights.append(model.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
def test_an_interrupted_training_goes_on_where_it_was(tokenizer, examples, tmp_path, monkeypatch, adapters):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    def train(folder, **options):
        model = make_family_model("llama")
        if adapters:
            model = attach_lora(model, LoraSettings(rank=2, dropout=0.1), seed=0)
        settings = SftSettings(batch_size=2, max_steps=7, learning_rate=1e-2, save_steps=2)
        report = train_on_answers(model, tokenizer, examples, settings, folder, progress=False, **options)
        return report, {name: p for name, p in model.named_parameters() if p.requires_grad}

    whole_report, whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", callbacks=[Stop()])
    (tmp_path / "cut" / "checkpoint-6").mkdir()  # one that was cut off while it was written
    steps = []
    original = AnswerTrainer.training_step
    monkeypatch.setattr(training.AnswerTrainer, "training_step", lambda self, *a: steps.append(1) or original(self, *a))
    report, resumed = train(tmp_path / "cut")
    assert len(steps) == 3, "only what was not trained yet"
    assert report["losses"] == whole_report["losses"]
    assert all(torch.equal(resumed[name], p) for name, p in whole.items())


def test_steps_cover_the_epochs():
    assert SftSettings(epochs=2, batch_size=4).steps(9) == 5
    assert SftSettings(epochs=1, batch_size=128).steps(9) == 1
    assert SftSettings(max_steps=3).steps(1000) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"warmup_ratio": 1}, "warmup_ratio is 1"),
        ({"max_steps": 0}, "max_steps is 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SftSettings(**options)


def test_a_folder_is_made_once_and_whole(tmp_path, capsys):
    calls = []

    def make(folder, work):
        calls.append(1)
        (work / "kept").touch()
        (folder / "half").touch()
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"calls": len(calls)}

    folder = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        make_once(folder, {"a": 1}, make)
    assert not folder.exists()
    assert (tmp_path / ".made.work" / "kept").exists(), "an interrupted training keeps its checkpoints"
    assert make_once(folder, {"a": 1}, make) == {"calls": 2}
    assert make_once(folder, {"a": 1}, make) == {"calls": 2}
    assert "made from the same things" in capsys.readouterr().out
    assert len(calls) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    with pytest.raises(ValueError, match="a: 1 -> 2"):
        make_once(folder, {"a": 2}, make)
    assert json.loads((folder / "made_from.json").read_text())["identity"] == {"a": 1}


def test_checkpoints_of_other_things_are_not_gone_on_with(tmp_path):
    def interrupted(folder, work):
        (work / "kept").touch()
        raise KeyboardInterrupt

    def kept(folder, work):
        return {"kept": (work / "kept").exists()}

    for name, second, expected in (("same", 1, True), ("other", 2, False)):
        with pytest.raises(KeyboardInterrupt):
            make_once(tmp_path / name, {"a": 1}, interrupted)
        assert make_once(tmp_path / name, {"a": second}, kept) == {"kept": expected}


def test_two_do_not_make_one_folder(tmp_path):
    def make(folder, work):
        with pytest.raises(ValueError, match="another process is making it"):
            make_once(tmp_path / "made", {"a": 2}, make)
        return {"work": sorted(path.name for path in work.iterdir())}

    assert make_once(tmp_path / "made", {"a": 1}, make) == {"work": ["lock", "made_from.json"]}


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "theirs").mkdir()
    with pytest.raises(ValueError, match=r"holds no made_from\.json"):
        make_once(tmp_path / "theirs", {}, lambda folder, work: {})


def test_the_optimizer_gets_the_settings(tmp_path):
    settings = training.SftSettings(learning_rate=3e-4, weight_decay=0.1, warmup_ratio=0.1, max_grad_norm=0.7)
    dataset = SimpleNamespace(max_steps=50, batch_sizes=(0, 4))
    found = training._training_arguments(settings, dataset, tmp_path, progress=False)
    assert (found.learning_rate, found.weight_decay, found.warmup_steps, found.max_grad_norm) == (3e-4, 0.1, 5, 0.7)

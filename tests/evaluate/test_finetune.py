"""Fine-tuning robustness and recovery on tiny models: what is trained, saved, measured and refused."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from deepalign.defenses import LoraSettings, PlainLora, SafeLora, SaLora, SaLoraSettings, SftSettings, merged_model
from deepalign.defenses.training import encode_conversations, mean_answer_loss
from deepalign.evaluate import recovery
from deepalign.evaluate.finetune import (
    FinetuneSettings,
    finetune,
    finetune_and_measure,
    measure_safety,
    split_rows,
)
from deepalign.evaluate.outcomes import AttackExample
from deepalign.evaluate.recovery import recover, recovery_config, save_merged
from deepalign.models import load_frozen_model, load_model, load_tokenizer
from deepalign.train.config import load_config
from tests.defenses.conftest import make_conversations
from tests.tiny import save_pair
from tests.train.forked import train_on_forked_ranks

SETTINGS = FinetuneSettings(SftSettings(batch_size=4, epochs=2, learning_rate=1e-2), eval_share=0.25)
LORA = LoraSettings(rank=2)
ROWS = make_conversations(16, seed=5)
EXAMPLES = [AttackExample("w1 w2", "w20 w21"), AttackExample("w3", "w22 w23")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """aligned, base: tiny models with a tokenizer."""
    folder = save_pair(tmp_path_factory.mktemp("models"))
    return {name: str(folder / name) for name in ("aligned", "base")}


def run(folders, out, **options):
    options = {"settings": SETTINGS, "method": PlainLora(LORA), "progress": False, **options}
    return finetune(folders["aligned"], ROWS, out, **options)


def judge(example, prefix, continuation):
    return "harmful" if len(set(continuation.split())) > 2 else "refused"


def test_the_paper_settings_are_the_defaults():
    settings, lora = FinetuneSettings(), PlainLora().settings
    assert (settings.sft.learning_rate, settings.sft.epochs, settings.sft.batch_size) == (2e-4, 1.0, 128)
    assert (lora.rank, lora.alpha, lora.target_modules) == (32, None, None)


def test_losses_are_of_the_held_out_rows_and_the_saved_adapter(folders, tmp_path):
    result = run(folders, tmp_path / "adapter")
    assert (result.train_rows, result.eval_rows, result.steps, len(result.losses)) == (12, 4, 6, 6)
    tokenizer = load_tokenizer(folders["aligned"])
    train, held_out = split_rows(ROWS, 0.25, seed=42)
    aligned = load_frozen_model(folders["aligned"], torch.float32)
    encoded = encode_conversations(held_out, tokenizer, aligned, None)
    assert result.eval_loss_before == pytest.approx(mean_answer_loss(aligned, tokenizer, encoded))
    tuned = merged_model(folders["aligned"], result.adapter)
    assert result.eval_loss == pytest.approx(mean_answer_loss(tuned, tokenizer, encoded))
    trained = encode_conversations(train, tokenizer, aligned, None)
    assert mean_answer_loss(tuned, tokenizer, trained) < mean_answer_loss(aligned, tokenizer, trained) - 0.05
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)


def test_the_split_is_seeded_and_disjoint():
    rows = list(range(50))
    train, held_out = split_rows(rows, 0.1, seed=1)
    assert sorted(train + held_out) == rows
    assert len(held_out) == 5
    assert split_rows(rows, 0.1, seed=1) == (train, held_out)
    assert split_rows(rows, 0.1, seed=2) != (train, held_out)
    assert [len(part) for part in split_rows([1, 2], 0.01, seed=0)] == [1, 1]
    assert [len(part) for part in split_rows([1, 2], 0.99, seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="two are needed"):
        split_rows([1], 0.5, seed=0)


def test_a_second_call_loads_and_the_same_seed_trains_the_same(folders, tmp_path, capsys):
    first = run(folders, tmp_path / "a")
    assert run(folders, tmp_path / "a", progress=True) == first
    assert "made from the same things" in capsys.readouterr().out
    again = run(folders, tmp_path / "b")
    assert again.losses == first.losses
    weights = [load_file(str(r.adapter / "adapter_model.safetensors")) for r in (first, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(ValueError, match="made from other things \\(method"):
        run(folders, tmp_path / "a", method=PlainLora(LoraSettings(rank=3)))
    with pytest.raises(ValueError, match="model"):
        finetune(folders["base"], ROWS, tmp_path / "a", SETTINGS, method=PlainLora(LORA))


def test_an_interrupted_fine_tuning_goes_on(folders, tmp_path, monkeypatch):
    from deepalign.defenses.training import AnswerTrainer

    settings = FinetuneSettings(SftSettings(batch_size=4, max_steps=5, learning_rate=1e-2, save_steps=2))
    whole = run(folders, tmp_path / "whole", settings=settings)
    steps, original = [], AnswerTrainer.training_step

    def interrupted(self, *arguments):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(AnswerTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folders, tmp_path / "cut", settings=settings)
    assert not (tmp_path / "cut").exists()
    resumed = run(folders, tmp_path / "cut", settings=settings)
    assert len(steps) == 4 + 3, "steps 3 to 5 only"
    assert resumed.losses == whole.losses
    weights = [load_file(str(r.adapter / "adapter_model.safetensors")) for r in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"], "no work folder is left"


def methods(folders):
    salora = SaLoraSettings(rank=2, alpha=2, safety_rank=3, task_rank=4, target_modules=None)
    return {
        "lora": PlainLora(LORA),
        "safe_lora": SafeLora(folders["base"], threshold=1.0, settings=LORA),
        "salora": SaLora(make_conversations(6, seed=9), salora),
    }


@pytest.mark.parametrize("name", ["lora", "safe_lora", "salora"])
def test_every_method_fine_tunes_and_saves_what_it_trained(folders, tmp_path, name):
    result = run(folders, tmp_path / "adapter", method=methods(folders)[name])
    assert math.isfinite(result.eval_loss)
    assert result.losses[-1] < result.losses[0]
    merged_model(folders["aligned"], result.adapter)
    if name == "safe_lora":
        assert result.method["projected_layers"] == 14
        assert all(layer["projected"] for layer in result.method["layers"])
    if name == "salora":
        assert result.method == {"saved_rank": 4}


def test_salora_trains_on_after_an_interruption(folders, tmp_path, monkeypatch):
    """Its frozen weights are made anew; its trained factors come from the checkpoint."""
    from deepalign.defenses.training import AnswerTrainer

    settings = FinetuneSettings(SftSettings(batch_size=4, max_steps=4, learning_rate=1e-2, save_steps=2))
    whole = run(folders, tmp_path / "whole", settings=settings, method=methods(folders)["salora"])
    steps, original = [], AnswerTrainer.training_step

    def interrupted(self, *arguments):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(AnswerTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folders, tmp_path / "cut", settings=settings, method=methods(folders)["salora"])
    resumed = run(folders, tmp_path / "cut", settings=settings, method=methods(folders)["salora"])
    assert resumed.losses == pytest.approx(whole.losses)
    assert resumed.eval_loss == pytest.approx(whole.eval_loss)


def test_safety_and_utility_are_measured_before_and_after(folders, tmp_path):
    asked = []

    def utility(model, tokenizer):
        asked.append(model.training)
        return {"right": len(asked)}

    result, before, after = finetune_and_measure(
        folders["aligned"], ROWS, tmp_path / "adapter", EXAMPLES, judge, SETTINGS, method=PlainLora(LORA),
        progress=False, depths=(0, 1, None), max_new_tokens=4, utility=utility,
    )  # fmt: skip
    tokenizer = load_tokenizer(folders["aligned"])
    for measured, model in (
        (before, load_frozen_model(folders["aligned"], torch.float32)),
        (after, merged_model(folders["aligned"], result.adapter)),
    ):
        expected = measure_safety(
            model, tokenizer, EXAMPLES, judge, depths=(0, 1, None), max_new_tokens=4, progress=False
        )
        assert measured.attacks == expected.attacks
        assert list(measured.attacks) == ["0", "1", "all"]
        assert measured.hrr == (expected.attacks["0"].harmful, 2)
    assert [measured.utility for measured in (before, after)] == [{"right": 1}, {"right": 2}]
    assert asked == [False, False]
    assert before.to_dict()["attacks"]["all"]["n"] == 2
    assert [r["continuation"] for r in before.attacks["0"].records] != [
        r["continuation"] for r in after.attacks["0"].records
    ]


def test_hrr_needs_the_plain_request(folders):
    model, tokenizer = load_frozen_model(folders["aligned"], torch.float32), load_tokenizer(folders["aligned"])
    measured = measure_safety(model, tokenizer, EXAMPLES, judge, depths=(1,), max_new_tokens=2, progress=False)
    with pytest.raises(ValueError, match="HRR needs depth 0; measured were 1"):
        _ = measured.hrr


@pytest.mark.parametrize(
    ("options", "message"), [({"eval_share": 1.0}, "eval_share is 1"), ({"eval_batch_size": 0}, "eval_batch_size is 0")]
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FinetuneSettings(**options)


def test_bad_input_is_refused(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="model_path"):
        finetune(str(tmp_path / "nowhere"), ROWS, tmp_path / "a")
    with pytest.raises(ValueError, match="row 1: no answer token is left"):
        run(folders, tmp_path / "a", settings=FinetuneSettings(SftSettings(max_length=3)))
    assert not list(tmp_path.iterdir()), "nothing is written"


# ---- recovery ----


@pytest.fixture(scope="module")
def degraded(folders, tmp_path_factory):
    """The aligned model after fine-tuning, as a folder of its own; and training data."""
    folder = tmp_path_factory.mktemp("degraded")
    adapter = run(folders, folder / "adapter").adapter
    merged = save_merged(folders["aligned"], adapter, folder / "model", progress=False)
    for name, seed in (("harmful", 6), ("utility", 7)):
        lines = [
            json.dumps({"prompt": row[0]["content"], "completion": row[1]["content"]})
            for row in make_conversations(8, seed)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {"model": merged, "harmful": str(folder / "harmful.jsonl"), "utility": str(folder / "utility.jsonl")}


def config(folders, degraded, out, **options):
    training = {
        "harmful_data": degraded["harmful"],
        "utility_data": degraded["utility"],
        "loss": {"top_k": 3, "lambda_reg": 0.01},
        "distill_on": "both",
        "harmful_batch_size": 4,
        "utility_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    return recovery_config(
        degraded=degraded["model"],
        original=folders["aligned"],
        base=folders["base"],
        output_dir=out,
        **{**training, **options},
    )


def test_a_merged_model_is_the_model_with_its_adapter(folders, degraded, tmp_path, capsys):
    adapter = degraded["model"].parent / "adapter"
    merged, expected = load_model(str(degraded["model"]), torch.float32), merged_model(folders["aligned"], adapter)
    ids = torch.tensor([[4, 7, 8, 20]])
    torch.testing.assert_close(merged.eval()(input_ids=ids).logits, expected(input_ids=ids).logits)
    save_merged(folders["aligned"], adapter, degraded["model"])
    assert "made from the same things" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made from other things"):
        save_merged(folders["base"], adapter, degraded["model"])
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        save_merged(folders["aligned"], tmp_path, tmp_path / "out")


def test_the_student_is_the_degraded_model_and_the_reference_is_chosen(folders, degraded, tmp_path):
    original = config(folders, degraded, tmp_path / "out")
    assert (original.student, original.aligned, original.base) == (
        str(degraded["model"]), folders["aligned"], folders["base"],
    )  # fmt: skip
    assert config(folders, degraded, tmp_path / "out", reference="degraded").aligned == str(degraded["model"])
    kl_only = config(folders, degraded, tmp_path / "out", control="kl_only")
    assert (kl_only.completion_weight_harmful, kl_only.completion_weight_utility) == (0, 0)
    assert config(folders, degraded, tmp_path / "out", control="random_m").selection == "random"


def test_recoveries_train_and_controls_differ(folders, degraded, tmp_path):
    first = {}
    for name, options in {
        "original": {},
        "degraded": {"reference": "degraded"},
        "kl_only": {"control": "kl_only"},
        "random_m": {"control": "random_m"},
    }.items():
        recovered = recover(config(folders, degraded, tmp_path / name, **options))
        metrics = (recovered.parent / "metrics.jsonl").read_text().splitlines()
        assert len(metrics) == 2
        first[name] = json.loads(metrics[0])
        load_model(str(recovered), torch.float32)
    assert first["kl_only"]["completion"] == 0
    assert first["original"]["kl"] == first["kl_only"]["kl"] == first["random_m"]["kl"] > 0
    assert first["original"]["completion"] != first["random_m"]["completion"]
    assert first["degraded"]["kl"] != first["original"]["kl"]


def test_a_recovery_is_trained_once(folders, degraded, tmp_path, capsys):
    settings = config(folders, degraded, tmp_path / "out")
    recovered = recover(settings)
    weights = (recovered / "model.safetensors").stat().st_mtime_ns
    assert recover(settings) == recovered
    assert "trained with the same configuration" in capsys.readouterr().out
    assert (recovered / "model.safetensors").stat().st_mtime_ns == weights
    assert load_config(tmp_path / "out.yaml") == settings, "run.py would train the same"
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["student"] == str(degraded["model"])
    with pytest.raises(RuntimeError, match="training ended with code 2"):
        recover(config(folders, degraded, tmp_path / "out", learning_rate=0.5))
    assert "written by another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "base"}, "reference is 'base'; expected one of original, degraded"),
        ({"control": "random"}, "control is 'random'; expected one of none, kl_only, random_m"),
        ({"control": "random_m", "selection": "random"}, "selection: set by the recovery"),
        ({"lr": 1}, "unknown configuration key lr"),
    ],
)
def test_bad_recoveries_are_refused(folders, degraded, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(folders, degraded, tmp_path / "out", **options)


def test_ranks_need_the_cpu_to_be_asked_for(folders, degraded, tmp_path):
    with pytest.raises(ValueError, match="use_cpu is not set"):
        recover(config(folders, degraded, tmp_path / "out"), ranks=2)


@pytest.mark.timeout(300)
def test_a_recovery_on_two_ranks_is_that_of_one(folders, degraded, tmp_path, monkeypatch):
    """What `recovery_ranks` of a suite starts: DeepSpeed on CPU ranks; the same batches, so the same model.

    The launcher itself is at work in `tests/microworld/test_demo.py`.
    """
    launched = []
    monkeypatch.setattr(
        recovery, "launch_on_cpu", lambda config, ranks: (launched.append(ranks), train_on_forked_ranks(config, ranks))
    )
    one, two = (
        config(folders, degraded, tmp_path / f"ranks-{ranks}", use_cpu=True, world_size=ranks) for ranks in (1, 2)
    )
    weights = [load_file(str(recover(c, ranks=c.world_size) / "model.safetensors")) for c in (one, two)]
    assert launched == [2]
    start = load_file(str(degraded["model"] / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    moved = max(float((weights[0][name] - start[name]).abs().max()) for name in start)
    apart = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in start)
    assert moved > 5e-4, "both have trained"
    assert apart < 1e-3 * moved

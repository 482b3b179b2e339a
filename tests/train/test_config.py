import json

import pytest
import yaml

from deepalign.train.config import PRESETS, TrainConfig, deepspeed_config_path, deepspeed_settings, load_config

REQUIRED = {"aligned": "a", "base": "b", "output_dir": "o", "harmful_data": "h.jsonl", "utility_data": "u.jsonl"}


@pytest.fixture
def write(tmp_path):
    def write_config(**values):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(REQUIRED | values))
        return path

    return write_config


def test_defaults_are_the_papers_where_it_says(write):
    config = load_config(write())
    assert (config.loss.top_k, config.loss.teacher_mix, config.loss.temperature, config.epochs) == (100, 1.2, 2.0, 20)
    assert config == TrainConfig(**REQUIRED)


def test_the_command_line_overrides_the_file(write):
    path = write(learning_rate=1e-4, loss={"top_k": 7, "gamma": 0.5})
    words = [
        "--learning_rate",
        "3e-4",
        "--loss.top_k=9",
        "--deepspeed",
        "zero3",
        "--max-steps",
        "12",
        "--bf16",
        "false",
    ]
    config = load_config(path, words)
    assert config.learning_rate == 3e-4
    assert load_config(path, ["--report_to", "tensorboard, wandb"]).trackers == ["tensorboard", "wandb"]
    assert (config.loss.top_k, config.loss.gamma) == (9, 0.5)
    assert (config.deepspeed, config.max_steps, config.bf16) == ("zero3", 12, False)


def test_numbers_that_yaml_reads_as_text_are_numbers(write):
    assert load_config(write(learning_rate="3e-4", warmup_steps=5.0)).learning_rate == 3e-4


@pytest.mark.parametrize(
    ("values", "words", "error", "problem"),
    [
        ({"learning_rat": 1}, [], ValueError, "unknown configuration key learning_rat; did you mean learning_rate?"),
        ({"loss": {"topk": 1}}, [], ValueError, "unknown configuration key loss.topk; did you mean loss.top_k?"),
        ({}, ["--zzz", "1"], ValueError, "unknown configuration key zzz; known keys: aligned"),
        ({}, ["learning_rate", "1"], ValueError, "unexpected argument 'learning_rate'"),
        ({}, ["--learning_rate"], ValueError, "--learning_rate has no value"),
        ({}, ["--seed.x", "1"], TypeError, "seed is {'x': 1}"),
        ({"learning_rate": "fast"}, [], TypeError, "learning_rate is 'fast' (str); expected float"),
        ({"max_steps": 2.5}, [], TypeError, "max_steps is 2.5 (float); expected int"),
        ({"seed": True}, [], TypeError, "seed is True (bool); expected int"),
        ({"loss": 3}, [], TypeError, "loss holds keys of its own"),
        (
            {},
            ["--chat_template_options.date_string", "2024-07-26"],
            TypeError,
            "datetime.date(2024, 7, 26)",
        ),
        ({"distill_on": "all"}, [], ValueError, "distill_on is 'all'; expected one of 'utility', 'harmful', 'both'"),
        ({"aligned": None}, [], ValueError, "does not set aligned"),
        ({"learning_rate": 0}, [], ValueError, "learning_rate is 0.0; it must be positive"),
        ({"learning_rate": ".nan"}, [], TypeError, "learning_rate is '.nan'"),
        ({"learning_rate": float("nan")}, [], ValueError, "learning_rate is nan"),
        ({"completion_weight_harmful": -1}, [], ValueError, "completion_weight_harmful is -1.0; it must be at least 0"),
        ({"max_steps": 0}, [], ValueError, "max_steps is 0; it must be at least 1, or null"),
        ({"utility_data": None}, [], ValueError, "utility_data is not set but utility_batch_size is not 0"),
        ({"utility_batch_size": 0}, [], ValueError, "nothing would be distilled"),
        ({"loss": {"temperature": 0}}, [], ValueError, "temperature"),
        ({"loss": {"top_k": 0}}, [], ValueError, "top_k"),
        ({"lora": {"r": 0}}, [], ValueError, "lora.r is 0; it must be at least 1"),
        ({"lora": {"rank": 8}}, [], ValueError, "unknown configuration key lora.rank"),
        ({"lora": {"dropout": 0.1, "train_lm_head": True}}, [], ValueError, "lora.train_lm_head needs lora.dropout 0"),
        ({"lora": {"target_modules": []}}, [], ValueError, "lora.target_modules is empty"),
        ({"teacher": "cache"}, [], ValueError, "teacher is 'cache' but teacher_cache is not set"),
        ({"loss_form": "fused"}, [], ValueError, "loss_form is 'fused'; expected one of 'linear', 'logits'"),
        ({"on_nan": "ignore"}, [], ValueError, "on_nan is 'ignore'; expected one of 'stop', 'skip'"),
        ({"adam_beta2": 1}, [], ValueError, "adam_beta2 is 1.0; it must be at least 0 and below 1"),
        ({}, ["--lora", "{r: 2"], ValueError, "--lora: '{r: 2' is not valid YAML"),
        ({"mean_logit_drift": 0}, [], ValueError, "mean_logit_drift is 0.0; it must be positive, or null"),
    ],
)
def test_bad_configurations_are_refused(write, values, words, error, problem):
    with pytest.raises(error) as refused:
        load_config(write(**values), words)
    assert problem in str(refused.value)


def test_files_that_are_no_configuration_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="expected keys and values at the top level, got list"):
        load_config(path)
    path.write_text("loss: {top_k: 9}\nseed: 1\nloss: {gamma: 2}\n")
    with pytest.raises(ValueError, match="the key loss is given twice"):
        load_config(path)
    path.write_bytes(b"aligned: caf\xe9\n")
    with pytest.raises(ValueError, match=r"list\.yaml is not UTF-8"):
        load_config(path)
    path.write_text("a: [1\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(path)


def test_an_adapter_is_configured_by_its_own_keys(write):
    config = load_config(write(lora={"r": 8}), ["--lora.target_modules", "[q_proj, v_proj]"])
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (8, 32, ("q_proj", "v_proj"))
    assert load_config(write()).lora is None
    assert load_config(write(), ["--lora.r", "4"]).lora.r == 4


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_presets_differ_from_the_plain_ones_in_that_alone(stage):
    plain, offload = (json.loads((PRESETS / f"zero{stage}{end}.json").read_text()) for end in ("", "_offload"))
    moved = {
        name: offload["zero_optimization"].pop(name)
        for name in set(offload["zero_optimization"]) - set(plain["zero_optimization"])
    }
    assert plain == offload
    assert moved.keys() == ({"offload_optimizer"} if stage == 2 else {"offload_optimizer", "offload_param"})
    assert all(place["device"] == "cpu" for place in moved.values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_presets_are_of_their_stage_and_compile_nothing(stage):
    preset = json.loads(deepspeed_config_path(f"zero{stage}").read_text())
    assert preset["zero_optimization"]["stage"] == stage
    assert "optimizer" not in preset  # DeepSpeed would compile FusedAdam
    if stage == 3:
        assert preset["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


def test_a_deepspeed_file_of_ones_own_is_taken(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{}")
    assert deepspeed_config_path(str(path)) == path
    assert deepspeed_settings(str(path))["gradient_clipping"] == "auto", "without the key DeepSpeed does not clip"
    path.write_text('{"gradient_clipping": 3, "fp16": {}}')
    assert deepspeed_settings(str(path))["gradient_clipping"] == 3
    assert "bf16" not in deepspeed_settings(str(path))
    for text, problem in (("{", "is not valid JSON"), ("[]", "holds a list; expected a JSON object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"deepspeed: .*mine\.json {problem}"):
            deepspeed_settings(str(path))
    with pytest.raises(FileNotFoundError, match=r"neither a preset \(zero0, zero1, .*\) nor a JSON file"):
        deepspeed_config_path("zero9")
    assert len(list(PRESETS.glob("*.json"))) == 6

"""Every recipe trains a tiny random model of its family: the file as it is, with local folders in place of the hub."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from deepalign.train.config import TrainConfig, deepspeed_config_path, load_config
from deepalign.train.run import main
from tests.families import FAMILIES
from tests.train.conftest import read_metrics

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = ("llama2_7b_chat", "llama31_8b", "qwen25_7b", "qwen3_8b")
VARIANTS = ("literal", "recommended")
# what the real models' files say, where the method depends on it
REAL_WIDTHS = {"qwen25_7b": (152064, 151665), "qwen3_8b": (151936, 151669)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    pairs, train = folder / "Harmful-HEx-PHI.jsonl", folder / "train.jsonl"
    messages = [
        [{"role": "user", "content": f"make {i}"}, {"role": "assistant", "content": f"take {i}"}] for i in range(20)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in messages))
    train.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(20)))
    return {"harmful": pairs, "utility": folder}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name in RECIPES:
        for seed, kind in enumerate(("aligned", "base")):
            FAMILIES[name].model(seed).save_pretrained(folder / name / kind)
            FAMILIES[name].tokenizer().save_pretrained(folder / name / kind)
    return {name: folder / name for name in RECIPES}


def local(name: str, models, data, out: Path) -> list[str]:
    """Only where things are, how long, and without the launcher; everything else is the recipe's."""
    folder = models[name]
    places = {"aligned": folder / "aligned", "base": folder / "base", "output_dir": out}
    places |= {"harmful_data": f"harmful-hex-phi:{data['harmful']}", "utility_data": f"gsm8k@train:{data['utility']}"}
    words = [f"--{key}={value}" for key, value in places.items()]
    return ["--config", str(CONFIGS / f"{name}.yaml"), *words, "--max_steps=2", "--deepspeed=null", "--use_cpu=true"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_a_model_of_its_family(name, variant, models, data, tmp_path):
    assert main([*local(name, models, data, tmp_path / "out"), "--variant", variant]) == 0
    metrics = read_metrics(tmp_path / "out")
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert line["loss"] == pytest.approx(line["kl"] + line["completion"], rel=1e-5)
        assert line["completion"] > 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    assert type(trained.config) is FAMILIES[name].config
    aligned = AutoModelForCausalLM.from_pretrained(models[name] / "aligned")
    assert any((a != b).any() for a, b in zip(trained.parameters(), aligned.parameters(), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_the_paper_says(name):
    literal, recommended = (load_config(CONFIGS / f"{name}.yaml", ["--variant", variant]) for variant in VARIANTS)
    for config in (literal, recommended, load_config(CONFIGS / f"{name}.yaml")):
        loss = config.loss
        assert (loss.top_k, loss.teacher_mix, loss.temperature, config.epochs) == (100, 1.2, 2.0, 20)
        assert (config.harmful_data, config.utility_data) == ("harmful-hex-phi", "gsm8k@train")
        assert config.chat_template_options == FAMILIES[name].options
        assert (config.selection, loss.penalty) == ("base_favored", "square")
        assert deepspeed_config_path(config.deepspeed).is_file()
        assert config.harmful_batch_size % 8 == config.utility_batch_size % 8 == 0, "eight ranks"
    assert (literal.distill_on, literal.loss.favored_from) == ("utility", "aligned")
    assert (recommended.distill_on, recommended.loss.favored_from) == ("both", "student")
    assert load_config(CONFIGS / f"{name}.yaml") == recommended
    fields = TrainConfig.__dataclass_fields__
    assert {name for name in fields if getattr(literal, name) != getattr(recommended, name)} == {"distill_on", "loss"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_place_for_its_teachers_states(name):
    """So that `deepalign cache-teacher --config X` and `--teacher cache` work as README and docs show them."""
    config = load_config(CONFIGS / f"{name}.yaml", ["--teacher", "cache"])
    assert config.teacher_cache == f"runs/teachers/{name}"
    assert load_config(CONFIGS / f"{name}.yaml").teacher == "online"


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_paper_does_not_say_is_marked(name):
    """Every number of the schedule and of the loss is the paper's or marked "ours"."""
    papers = {"top_k", "teacher_mix", "temperature", "epochs", "seed", "logging_steps", "save_steps"}
    for line in (CONFIGS / f"{name}.yaml").read_text().splitlines():
        if line.lstrip().startswith("#"):
            continue
        key, _, value = line.strip().partition(":")
        number = yaml.safe_load(value) if value else None
        if isinstance(number, int | float) and not isinstance(number, bool) and key not in papers:
            assert "# ours" in line, line


@pytest.mark.parametrize("name", REAL_WIDTHS)
def test_padded_vocabularies_are_padded_as_the_real_ones(name):
    width, entries = REAL_WIDTHS[name]
    assert FAMILIES[name].padding == width - entries
    assert f"The logits are {width} wide, the tokenizer has {entries} entries" in (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", ["llama31_8b", "qwen3_8b"])
def test_packed_rows_give_the_same_losses(name, models, data, tmp_path):
    """Through run.py: the first step's loss with packing and without, in fp32."""
    losses = []
    for packing in ("false", "true"):
        words = local(name, models, data, tmp_path / packing)
        assert main([*words, "--packing", packing, "--max_steps=1"]) == 0
        losses.append(read_metrics(tmp_path / packing)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- variants ----


def write(tmp_path, values) -> Path:
    path = tmp_path / "config.yaml"
    required = {"aligned": "a", "base": "b", "output_dir": "o", "harmful_data": "h", "utility_data": "u"}
    path.write_text(yaml.safe_dump(required | values))
    return path


def test_a_variant_replaces_the_files_values_and_the_command_line_both(tmp_path):
    path = write(
        tmp_path,
        {
            "variant": "b",
            "epochs": 3,
            "loss": {"top_k": 7, "gamma": 0.5},
            "variants": {"a": {"epochs": 1}, "b": {"epochs": 2, "loss": {"top_k": 9}}},
        },
    )
    assert (load_config(path).epochs, load_config(path).loss.top_k, load_config(path).loss.gamma) == (2, 9, 0.5)
    chosen = load_config(path, ["--variant", "a"])
    assert (chosen.epochs, chosen.loss.top_k) == (1, 7)
    assert load_config(path, ["--variant=b", "--loss.top_k", "11"]).loss.top_k == 11


@pytest.mark.parametrize(
    ("values", "words", "problem"),
    [
        ({}, ["--variant", "a"], "variant is 'a'; this configuration has no variants"),
        ({"variants": {"a": {}, "b": {}}}, [], "chooses none; set variant to a or b"),
        ({"variants": {"a": {}}, "variant": "c"}, [], "variant is 'c'; this configuration has a"),
        ({"variants": ["a"], "variant": "a"}, [], "variants must hold a block of keys per name"),
        ({"variants": {"a": {"epoch": 1}}, "variant": "a"}, [], "did you mean epochs"),
    ],
)
def test_a_variant_that_is_none_is_refused(tmp_path, values, words, problem):
    with pytest.raises(ValueError, match=problem):
        load_config(write(tmp_path, values), words)

"""LoRA: what is trained, what is saved, what is refused, and the merged model."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    GPT2Config,
    Llama4TextConfig,
    MixtralConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
)

from deepalign.cli import main as deepalign
from deepalign.defenses.lora import LoraSettings, attach_lora
from deepalign.train.config import LoraConfig
from deepalign.train.run import main
from deepalign.train.students import with_adapter
from tests.tiny import FAMILIES, make_model, make_tokenizer
from tests.train.jobs import weights
from tests.train.tiny_run import TinyRun, read_metrics

LORA = {"r": 2, "alpha": 8}


def trained_modules(model):
    return {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def final(tiny_run: TinyRun, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "out"
    config = tiny_run.config(out, lora=LORA | {"train_lm_head": True}, max_steps=5, learning_rate=0.01)
    assert main(["--config", str(config)]) == 0
    return out / "final"


def test_every_linear_layer_but_the_head_gets_an_adapter():
    student = with_adapter(make_model(0, make_tokenizer()), LoraConfig(r=2), seed=0)
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert trained_modules(student) == layers
    student = with_adapter(make_model(0, make_tokenizer()), LoraConfig(r=2, train_lm_head=True), seed=0)
    assert trained_modules(student) == layers | {"lm_head"}
    student = with_adapter(make_model(0, make_tokenizer()), LoraConfig(r=2, target_modules=("q_proj",)), seed=0)
    assert trained_modules(student) == {"q_proj"}


SIZES = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0}
SPARSE = SIZES | {"intermediate_size": 8, "moe_intermediate_size": 8, "num_key_value_heads": 1, "head_dim": 4}
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Llama4TextConfig(**SPARSE, intermediate_size_mlp=8, num_local_experts=2), ATTENTION | MLP),
        (PhimoeConfig(**SPARSE, num_local_experts=2), ATTENTION),
        (Qwen2MoeConfig(**SPARSE, shared_expert_intermediate_size=8, num_experts=4), ATTENTION | MLP),
        (
            AfmoeConfig(**SPARSE, num_experts=8, num_experts_per_tok=2, layer_types=["full_attention"] * 2),
            ATTENTION | {"experts", "base_layer"},
        ),
        (MixtralConfig(**SPARSE, num_local_experts=2), ATTENTION),
        (FalconConfig(**SIZES), {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        (GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2), {"c_attn", "c_proj", "c_fc"}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_routers_get_no_adapter_and_linear_layers_of_a_familys_own_do(config, expected):
    """Llama 4's and Phi's routers return tuples, which peft cannot wrap; Falcon's layers are subclasses, too."""
    model = AutoModelForCausalLM.from_config(config)
    student = with_adapter(model, LoraConfig(r=2), seed=0)
    assert trained_modules(student) == expected
    student(input_ids=torch.arange(6)[None]).logits.sum().backward()
    baseline = attach_lora(AutoModelForCausalLM.from_config(config), LoraSettings(rank=2), seed=0)
    assert trained_modules(baseline) == expected


def test_a_router_that_cannot_be_wrapped_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(Llama4TextConfig(**SPARSE, intermediate_size_mlp=8, num_local_experts=2))
    with pytest.raises(ValueError, match="no linear layers named router; it has down_proj"):
        with_adapter(model, LoraConfig(target_modules=("router",)), seed=0)


@pytest.mark.parametrize(
    ("settings", "tied", "problem"),
    [
        ({"target_modules": ("q_proj", "zzz")}, False, "the student has no linear layers named zzz; it has down_proj"),
        ({"target_modules": ("lm_head",)}, False, "say so by lora.train_lm_head: true"),
        ({"train_lm_head": True}, True, "the head of this model is tied to its embedding"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(settings, tied, problem):
    model = FAMILIES["llama"](0, make_tokenizer(), tie_word_embeddings=tied)
    with pytest.raises(ValueError, match="lora") as refused:
        with_adapter(model, LoraConfig(**settings), seed=0)
    assert problem in str(refused.value)


def test_a_fresh_adapter_changes_nothing_and_the_aligned_model_is_the_student_without_it(tiny_run, tmp_path):
    """The first loss of a LoRA training is that of full training, though there is no aligned model in memory."""
    first = []
    for name, lora in (("full", None), ("lora", LORA)):
        config = tiny_run.config(tmp_path / name, lora=lora, max_steps=1)
        assert main(["--config", str(config)]) == 0
        first.append(read_metrics(tmp_path / name)[0])
    for term in ("loss", "kl", "completion", "mean_logit", "aligned_mean_logit"):
        assert first[0][term] == pytest.approx(first[1][term], rel=1e-6)


def test_a_student_of_its_own_is_trained_against_a_whole_aligned_model(tiny_run, tmp_path):
    config = tiny_run.config(tmp_path / "out", lora=LORA, student=str(tiny_run.base), max_steps=1)
    assert main(["--config", str(config)]) == 0
    metrics = read_metrics(tmp_path / "out")[0]
    assert metrics["mean_logit"] != pytest.approx(metrics["aligned_mean_logit"], abs=1e-4)


def test_the_final_folder_is_an_adapter_with_a_card(final, tiny_run):
    saved = weights(final)
    assert all("lora_" in name for name in saved), "the frozen head is not copied beside its adapter"
    assert any("lm_head" in name for name in saved)
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_run.aligned)
    card = (final / "README.md").read_text()
    assert "AutoPeftModelForCausalLM" in card
    assert "library_name: peft" in card


@torch.no_grad()
def test_the_merged_model_is_the_adapted_one(final, tmp_path, capsys):
    out = tmp_path / "merged"
    assert deepalign(["merge", "--adapter", str(final), "--out", str(out)]) == 0
    adapted = AutoPeftModelForCausalLM.from_pretrained(final)
    merged = AutoModelForCausalLM.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(adapted.peft_config["default"].base_model_name_or_path)
    ids = torch.arange(6, 20)[None]
    logits = [model(input_ids=ids).logits for model in (merged, adapted, start)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert float((logits[0] - logits[2]).abs().max()) > 1e-2, "the adapter had been trained"
    assert "merged into its base model" in (out / "README.md").read_text()
    assert (out / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]

    assert deepalign(["merge", "--adapter", str(final), "--out", str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_merged_model_has_the_base_models_tokenizer_where_the_adapter_has_none(final, tiny_run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(final, bare, ignore=shutil.ignore_patterns("token*", "*.jinja"))
    assert deepalign(["merge", "--adapter", str(bare), "--out", str(tmp_path / "merged")]) == 0
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (tmp_path / "merged", tiny_run.aligned)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_merge_says_what_is_missing(final, tmp_path, capsys):
    assert deepalign(["merge", "--adapter", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err
    assert deepalign(["merge", "--adapter", str(final), "--out", str(tmp_path / "out"), "--base", "/nowhere/x"]) == 2
    assert "--base says where it is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

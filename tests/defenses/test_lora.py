import pytest
import torch

from deepalign.defenses.lora import LoraSettings, PlainLora, attach_lora, factors, lora_layers, merged_model
from tests.defenses.conftest import make_family_model


def test_the_update_is_alpha_over_rank_times_the_factors(llama):
    adapted = attach_lora(llama, LoraSettings(rank=3, alpha=7), seed=0)
    layers = dict(lora_layers(adapted))
    assert len(layers) == 2 * 7, "q k v o gate up down of two layers, and not the output head"
    layer = layers["model.layers.1.mlp.down_proj"]
    a, b = factors(layer)
    assert a.shape == (3, 24)
    assert b.shape == (16, 3)
    assert float(b.detach().abs().sum()) == 0
    with torch.no_grad():
        b.fill_(0.5)
        x = torch.ones(1, 24, dtype=torch.float64)
        expected = x @ layer.get_base_layer().weight.T + 7 / 3 * x @ (b @ a).T.to(x)
        torch.testing.assert_close(layer(x), expected)


def test_alpha_is_twice_the_rank_unless_given(llama):
    layer = next(layer for _, layer in lora_layers(attach_lora(llama, LoraSettings(rank=5), seed=0)))
    assert layer.scaling == {"default": 2.0}


def test_the_same_seed_gives_the_same_adapters_and_leaves_the_random_state_alone():
    def first_factor(seed):
        _, layer = next(lora_layers(attach_lora(make_family_model("llama"), LoraSettings(rank=2), seed)))
        return factors(layer)[0]

    torch.manual_seed(5)
    first = first_factor(1)
    after = torch.rand(1)
    assert torch.equal(first, first_factor(1))
    assert not torch.equal(first, first_factor(2))
    make_family_model("llama")  # as the first call did
    torch.manual_seed(0)
    make_family_model("llama")
    assert torch.rand(1) == after


def test_only_adapters_train(model):
    adapted = attach_lora(model, LoraSettings(rank=2, target_modules=("q_proj",)), seed=0)
    assert {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert [name for name, _ in lora_layers(adapted)] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_a_saved_adapter_merges_into_a_trainable_model(llama, tokenizer, examples, tmp_path):
    llama.float().save_pretrained(tmp_path / "model")
    adapted = PlainLora(LoraSettings(rank=2)).attach(llama, tokenizer, examples, seed=0)
    for _, layer in lora_layers(adapted):
        factors(layer)[1].data.fill_(0.1)
    PlainLora().save(adapted, tmp_path / "adapter")
    merged = merged_model(str(tmp_path / "model"), tmp_path / "adapter")
    ids = torch.tensor([examples[0].input_ids])
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)
    assert all(p.requires_grad for p in merged.parameters())
    assert not merged.training
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_bad_input_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="rank is 0"):
        LoraSettings(rank=0)
    with pytest.raises(ValueError, match="alpha is 0"):
        LoraSettings(alpha=0)
    with pytest.raises(ValueError, match="dropout is 1"):
        LoraSettings(dropout=1)
    with pytest.raises(ValueError, match="target_modules is empty"):
        LoraSettings(target_modules=())
    with pytest.raises(ValueError, match="no_such_proj"):
        attach_lora(llama, LoraSettings(target_modules=("no_such_proj",)), seed=0)
    with pytest.raises(FileNotFoundError, match="holds no adapter_config"):
        merged_model("anything", tmp_path)

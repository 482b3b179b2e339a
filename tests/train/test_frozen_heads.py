"""Heads out of checkpoints: those of the loaded models, without loading them."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepalign.output_head import output_head
from deepalign.train.frozen_heads import load_output_head, load_output_heads
from tests.test_output_head import FAMILIES, model_of
from tests.tiny import make_model, make_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_checkpoint_is_the_models(family, tmp_path):
    model = model_of(FAMILIES[family])
    model.save_pretrained(tmp_path)
    head, expected = load_output_head(str(tmp_path), torch.float32), output_head(model)
    assert torch.equal(head.lm_head, expected.lm_head)
    assert dataclasses.astuple(head)[1:] == dataclasses.astuple(expected)[1:], "softcap and scale"
    assert not head.lm_head.requires_grad


def test_weights_in_several_files(tmp_path):
    model = make_model(0, make_tokenizer())
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(load_output_head(str(tmp_path), torch.float32).lm_head, model.lm_head.weight)


def test_the_dtype_is_that_of_a_model_loaded_in_it(tmp_path):
    make_model(0, make_tokenizer()).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(load_output_head(str(tmp_path), torch.bfloat16).lm_head, loaded.lm_head.weight)


def test_equal_heads_are_one_matrix(tmp_path):
    tokenizer = make_tokenizer()
    first, second, other = (make_model(seed, tokenizer) for seed in (0, 1, 2))
    with torch.no_grad():
        second.lm_head.weight.copy_(first.lm_head.weight)
    paths = {}
    for name, model in (("first", first), ("second", second), ("other", other)):
        model.save_pretrained(tmp_path / name)
        paths[name] = str(tmp_path / name)
    heads = load_output_heads(paths, torch.float32)
    assert heads["first"].lm_head is heads["second"].lm_head
    assert heads["other"].lm_head is not heads["first"].lm_head
    assert torch.equal(heads["other"].lm_head, other.lm_head.weight)


def test_a_checkpoint_without_the_head_is_refused(tmp_path):
    make_model(0, make_tokenizer()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["head"] = weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no weights named lm_head.weight"):
        load_output_head(str(tmp_path), torch.float32)
    weights["lm_head.weight"] = weights.pop("head")[:-1].contiguous()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"\(47, 16\) in its weights and \(48, 16\) by its configuration"):
        load_output_head(str(tmp_path), torch.float32)


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    model = make_model(0, make_tokenizer())
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="read from safetensors"):
        load_output_head(str(tmp_path), torch.float32)

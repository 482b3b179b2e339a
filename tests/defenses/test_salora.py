"""SaLoRA against the dense matrices of its equations."""

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from deepalign.data.chat import EncodedExample
from deepalign.defenses.lora import factors, lora_layers
from deepalign.defenses.salora import SaLora, SaLoraSettings, attach_salora
from deepalign.defenses.training import SftSettings, encode_conversations, train_on_answers
from tests.defenses.conftest import make_conversations, make_family_model

SETTINGS = SaLoraSettings(
    rank=2, alpha=3, safety_rank=3, task_rank=4, safety_samples=3, task_samples=5, target_modules=None
)


@torch.no_grad()
def stacked_features(model: PreTrainedModel, examples: list[EncodedExample], name: str) -> torch.Tensor:
    """W x at the answer tokens, (tokens, out), from the inputs of the layer."""
    inputs = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0][0]))
    for example in examples:
        model(input_ids=torch.tensor([example.input_ids]))
    handle.remove()
    answers = [x[example.response_start :] for x, example in zip(inputs, examples, strict=True)]
    return torch.cat(answers) @ layer.weight.T


def leading(features: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svd(features, full_matrices=False).Vh[:rank].T


@torch.no_grad()
def test_starting_point_and_fixed_module(model, examples):
    kind = model.config.model_type
    untouched, safety, task = make_family_model(kind), examples[:4], examples[1:]
    adapted = attach_salora(model, safety, task, SETTINGS, seed=0)
    for name, layer in lora_layers(adapted):
        weight = untouched.get_submodule(name).weight
        u = leading(stacked_features(untouched, safety[:3], name), 3)
        t = leading(stacked_features(untouched, task[:5], name), 4)
        c = torch.eye(len(weight), dtype=torch.float64) - u @ u.T
        p, s, q = torch.linalg.svd(weight, full_matrices=False)
        b0 = t @ t.T @ p[:, :2] @ torch.diag(s[:2].sqrt())
        a0 = torch.diag(s[:2].sqrt()) @ q[:2]
        a, b = factors(layer)
        torch.testing.assert_close(b @ a, b0 @ a0)
        torch.testing.assert_close(layer.get_base_layer().weight, weight - 3 / 2 * c @ b0 @ a0)
        y = layer.lora_B["default"](torch.eye(2, dtype=torch.float64))  # row i: C b_i
        torch.testing.assert_close(y.T, c @ b)


@torch.no_grad()
def test_training_starts_from_the_model_as_it_was(model, examples):
    ids = torch.tensor([examples[0].input_ids])
    before = model(input_ids=ids).logits
    adapted = attach_salora(model, examples, examples, SETTINGS, seed=0).eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, before)


@torch.no_grad()
def test_whatever_is_learnt_outputs_do_not_move_along_the_safety_directions(llama, examples):
    untouched = make_family_model("llama")
    adapted = attach_salora(llama, examples, examples, SETTINGS, seed=0).eval()
    generator = torch.Generator().manual_seed(3)
    for name, layer in lora_layers(adapted):
        for factor in factors(layer):
            factor.copy_(torch.randn(factor.shape, generator=generator))
        x = torch.randn(5, layer.in_features, generator=generator, dtype=torch.float64)
        u = leading(stacked_features(untouched, examples[:3], name), 3)
        moved = layer(x) - untouched.get_submodule(name)(x)
        assert moved.abs().max() > 1
        torch.testing.assert_close(moved @ u, torch.zeros(5, 3, dtype=torch.float64), rtol=0, atol=1e-9)


@torch.no_grad()
def test_saved_adapters_are_ordinary_and_load_on_the_original_model(llama, tokenizer, examples, tmp_path):
    method = SaLora(make_conversations(4, seed=2), SETTINGS)
    adapted = method.attach(llama, tokenizer, examples, seed=0).eval()
    for _, layer in lora_layers(adapted):
        for factor in factors(layer):
            factor.mul_(1.7).add_(0.1)
    assert method.save(adapted, tmp_path) == {"saved_rank": 4}
    loaded = PeftModel.from_pretrained(make_family_model("llama"), str(tmp_path), autocast_adapter_dtype=False)
    ids = torch.tensor([examples[0].input_ids])
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, adapted(input_ids=ids).logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits)


def test_what_training_leaves_is_the_equations(llama, tokenizer, examples, tmp_path):
    """After real steps, saved and merged: W + s (C B A - C B_0 A_0), and nothing of it along U."""
    untouched, safety = make_family_model("llama"), make_conversations(4, seed=2)
    encoded = encode_conversations(safety[:3], tokenizer, untouched, None)
    adapted = SaLora(safety, SETTINGS).attach(llama, tokenizer, examples, seed=0)
    start = {name: [factor.detach().clone() for factor in factors(layer)] for name, layer in lora_layers(adapted)}
    schedule = SftSettings(max_steps=5, batch_size=3, learning_rate=5e-2)
    train_on_answers(adapted, tokenizer, examples, schedule, tmp_path / "work", progress=False)
    SaLora(safety, SETTINGS).save(adapted, tmp_path)
    original = make_family_model("llama")
    merged = PeftModel.from_pretrained(original, str(tmp_path), autocast_adapter_dtype=False).merge_and_unload()
    for name, layer in lora_layers(adapted):
        weight = untouched.get_submodule(name).weight.detach()
        u = leading(stacked_features(untouched, encoded, name), 3)
        c = torch.eye(len(weight), dtype=torch.float64) - u @ u.T
        (a0, b0), (a, b) = start[name], (factor.detach() for factor in factors(layer))
        change = merged.get_submodule(name).weight.detach() - weight
        torch.testing.assert_close(change, 3 / 2 * (c @ b @ a - c @ b0 @ a0), rtol=1e-5, atol=1e-7)
        assert change.norm() > 0.05 * weight.norm(), "it has learnt something"
        assert (u.T @ change).abs().max() < 1e-6 * change.norm()


def test_only_the_adapters_train(llama, examples):
    adapted = attach_salora(llama, examples, examples, SETTINGS, seed=0)
    trainable = {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}
    adapted(input_ids=torch.tensor([examples[0].input_ids])).logits.sum().backward()
    assert all(factor.grad.abs().sum() > 0 for _, layer in lora_layers(adapted) for factor in factors(layer))


def test_bad_input_is_refused(llama, tokenizer, examples):
    with pytest.raises(ValueError, match=r"safety_rank is 32 but model\.layers\.0\.self_attn\.q_proj has 16 outputs"):
        attach_salora(llama, examples, examples, SaLoraSettings(rank=2), seed=0)
    with pytest.raises(ValueError, match="safety samples"):
        SaLora([]).attach(llama, tokenizer, examples, seed=0)
    with pytest.raises(ValueError, match="safety_rank is 0"):
        SaLoraSettings(safety_rank=0)

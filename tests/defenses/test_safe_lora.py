"""Safe LoRA against the dense matrices of its equations."""

import math

import pytest
import torch

from deepalign.defenses.lora import LoraSettings, attach_lora, factors, lora_layers
from deepalign.defenses.safe_lora import SafeLora, project_lora
from tests.defenses.conftest import make_family_model


@pytest.fixture
def adapted(model):
    """Adapters with random factors, as after training."""
    adapted = attach_lora(model, LoraSettings(rank=3), seed=0)
    generator = torch.Generator().manual_seed(7)
    for _, layer in lora_layers(adapted):
        for factor in factors(layer):
            factor.data = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
    return adapted


def dense(layer, base_weight):
    """C, the update D, their cosine, and C D, from the printed equations."""
    v = layer.get_base_layer().weight - base_weight
    c = v @ v.T / torch.linalg.matrix_norm(v)
    a, b = factors(layer)
    update = layer.scaling["default"] * b @ a
    similarity = torch.nn.functional.cosine_similarity((c @ update).flatten(), update.flatten(), dim=0)
    return c @ update, update, float(similarity)


@torch.no_grad()
def test_updates_below_the_threshold_are_projected_and_no_others(adapted):
    base = make_family_model(adapted.config.model_type, seed=1)
    expected = {n: dense(layer, base.get_submodule(n).weight) for n, layer in lora_layers(adapted)}
    similarities = sorted(similarity for _, _, similarity in expected.values())
    threshold = (similarities[0] + similarities[-1]) / 2
    reported = {entry.name: entry for entry in project_lora(adapted, base, threshold=threshold)}
    assert reported.keys() == expected.keys()
    assert len({entry.projected for entry in reported.values()}) == 2
    for name, layer in lora_layers(adapted):
        projected, update, similarity = expected[name]
        assert reported[name].similarity == pytest.approx(similarity, rel=1e-5)
        assert reported[name].projected == (similarity < threshold)
        a, b = factors(layer)
        wanted = projected if similarity < threshold else update
        torch.testing.assert_close(layer.scaling["default"] * b @ a, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_aligned_model_of_its_own_can_be_given(adapted):
    kind = adapted.config.model_type
    aligned, base = make_family_model(kind, seed=5), make_family_model(kind, seed=1)
    name, layer = next(lora_layers(adapted))
    a, b = (factor.clone() for factor in factors(layer))
    v = aligned.get_submodule(name).weight - base.get_submodule(name).weight
    project_lora(adapted, base, aligned=aligned, threshold=1.0)
    torch.testing.assert_close(factors(layer)[1], v @ v.T @ b / v.norm(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(factors(layer)[0], a, rtol=0, atol=0)


@torch.no_grad()
def test_equal_models_have_no_direction_to_project_on(adapted):
    """V = 0: no similarity, and the update is left alone rather than deleted."""
    before = [factors(layer)[1].clone() for _, layer in lora_layers(adapted)]
    same = make_family_model(adapted.config.model_type, seed=0)
    layers = project_lora(adapted, same, threshold=1.0)
    assert all(math.isnan(layer.similarity) and not layer.projected for layer in layers)
    for (_, layer), b in zip(lora_layers(adapted), before, strict=True):
        assert torch.equal(factors(layer)[1], b)


def test_bad_input_is_refused(llama, tmp_path):
    adapted = attach_lora(llama, LoraSettings(rank=2), seed=0)
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        project_lora(adapted, make_family_model("llama", 1), threshold=1.5)
    smaller = make_family_model("llama", 1)
    smaller.model.layers = smaller.model.layers[:1]
    with pytest.raises(ValueError, match=r"the base model has no layer model\.layers\.1"):
        project_lora(adapted, smaller)
    with pytest.raises(FileNotFoundError, match="base: the model folder"):
        SafeLora(base=str(tmp_path / "nowhere"))

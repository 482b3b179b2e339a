"""The matrix of an output layer with and without adapters: what the layer computes, or a refusal."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from deepalign import lm_head_weight
from deepalign.kernels.completion_loss import fused_linear_completion_loss
from tests.kernels.linear_helpers import CONFIG, linear_models


class Model(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.lm_head = nn.Linear(48, 300, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)


def adapted(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Model(), LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["lm_head"], **options}))
    layer = model.base_model.model.lm_head
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return layer


@pytest.mark.parametrize("merged", [False, True])
def test_it_is_what_the_layer_computes(merged: bool) -> None:
    layer = adapted()
    if merged:
        layer.merge()
    hidden = torch.randn(5, 48)
    torch.testing.assert_close(hidden @ lm_head_weight(layer).t(), layer(hidden))
    assert not torch.allclose(hidden @ layer.get_base_layer().weight.t(), layer(hidden)) or merged
    plain = nn.Linear(48, 300, bias=False)
    assert lm_head_weight(plain) is plain.weight


def test_gradients_reach_the_adapter_through_the_linear_loss() -> None:
    layer = adapted()
    models = linear_models(6)
    fused_linear_completion_loss(
        models.student_hidden, lm_head_weight(layer), *models[2:], config=CONFIG
    ).loss.backward()
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dense = (layer.get_base_layer().weight + 3.0 * up @ down).detach().requires_grad_()
    fused_linear_completion_loss(models.student_hidden, dense, *models[2:], config=CONFIG).loss.backward()
    torch.testing.assert_close(up.grad, 3.0 * dense.grad @ down.detach().t())
    torch.testing.assert_close(down.grad, 3.0 * up.detach().t() @ dense.grad)
    assert layer.get_base_layer().weight.grad is None


def test_a_disabled_adapter_is_left_out() -> None:
    layer = adapted()
    layer.enable_adapters(False)
    assert torch.equal(lm_head_weight(layer), layer.get_base_layer().weight)


def test_what_is_no_plain_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has dropout 0\.1 in training"):
        lm_head_weight(adapted(lora_dropout=0.1).train())
    assert lm_head_weight(adapted(lora_dropout=0.1).eval()).shape == (300, 48)
    with pytest.raises(ValueError, match="DoRA"):
        lm_head_weight(adapted(use_dora=True))
    with pytest.raises(ValueError, match="has a bias"):
        lm_head_weight(adapted(lora_bias=True))
    with pytest.raises(ValueError, match="has a bias, which"):
        lm_head_weight(nn.Linear(48, 300))
    with pytest.raises(TypeError, match="is a Tensor; expected the output layer"):
        lm_head_weight(torch.zeros(300, 48))
    with pytest.raises(TypeError, match="without a weight"):
        lm_head_weight(nn.ReLU())

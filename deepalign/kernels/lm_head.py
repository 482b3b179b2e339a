"""The matrix behind an output layer, adapters included."""

from typing import Any

import torch
from torch import Tensor, nn


def lm_head_weight(module: nn.Module) -> Tensor:
    """The (V, H) matrix W such that `module(hidden)` is hidden W^T, differentiable in all of its parameters.

    A LoRA adapter (peft) on the output layer hides behind `module.weight`, which is the frozen matrix alone: a linear
    loss given that one would train as if there were no adapter. Here an unmerged adapter's scaled B A is added, a
    (V, H) temporary, and gradients reach A and B.

    Args:
        module: an `nn.Linear`, or peft's LoRA around one.

    Raises:
        TypeError: not a module with a matrix.
        ValueError: a bias, or an adapter that is no plain addition (DoRA, dropout in training, a bias of its own,
            another kind): merge it first (`model.merge_and_unload()`), or leave the output layer out of
            `target_modules`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; expected the output layer, a torch.nn.Module")
    base = getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise TypeError(f"module is a {type(module).__name__} without a weight (V, H); expected a linear layer")
    if getattr(base, "bias", None) is not None:
        raise ValueError(
            "module has a bias, which the linear forms do not take; expected a linear layer without one: use the logits"
        )
    if base is module:
        return weight
    if hasattr(base, "base_layer"):
        raise ValueError("module has adapters around adapters; expected one layer of them: merge them first")
    return _with_adapters(module, weight)


def _with_adapters(module: Any, weight: Tensor) -> Tensor:
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return weight
    if not hasattr(module, "lora_A") or not hasattr(module, "scaling"):
        raise ValueError(f"module is a {type(module).__name__}, an adapter that is not LoRA: merge it first")
    for name in module.active_adapters:
        if name not in module.lora_A:
            if name in getattr(module, "lora_embedding_A", ()):
                raise ValueError(
                    f"adapter {name!r} is one of an embedding; expected one of a linear layer: merge it first"
                )
            continue
        weight = weight + _added_matrix(module, name).to(weight.dtype)
    return weight


def _added_matrix(module: Any, name: str) -> Tensor:
    down, up = module.lora_A[name], module.lora_B[name]
    dropout = module.lora_dropout[name]
    if name in getattr(module, "lora_variant", {}) or getattr(module, "use_dora", {}).get(name, False):
        raise ValueError(f"adapter {name!r} is a variant of LoRA (DoRA or other): merge it first")
    if module.training and getattr(dropout, "p", 0.0) > 0:
        raise ValueError(
            f"adapter {name!r} has dropout {dropout.p} in training, which no matrix has; expected 0: set lora_dropout=0"
        )
    if up.bias is not None or down.bias is not None:
        raise ValueError(f"adapter {name!r} has a bias: merge it first")
    if getattr(module, "fan_in_fan_out", False):
        raise ValueError("module stores its matrix transposed (fan_in_fan_out): merge its adapters first")
    with torch.autocast(up.weight.device.type, enabled=False):
        return module.scaling[name] * (up.weight @ down.weight)

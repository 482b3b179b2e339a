"""Which layers of a model get a LoRA adapter where the user names none.

Every plain linear layer but the head and the routers of a mixture of experts: what a router learned in pretraining is
left alone, as is usual, also because some routers return more than a product (Llama 4, Phi-3.5-MoE), which breaks under
peft's wrapper.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_GATES = ("gate", "shared_expert_gate")  # routers too where they stand beside experts (Qwen2-MoE, HunYuan, Zaya)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that an adapter fits, by name, the head and routers among them."""
    return {name: module for name, module in model.named_modules() if _is_linear(module)}


def default_targets(model: PreTrainedModel) -> list[str]:
    """peft's `target_modules`: last names ("q_proj") where those say it, whole names where a router has the same.

    Raises:
        ValueError: the model has no linear layer but its head and routers.
    """
    linear, head = linear_layers(model), model.get_output_embeddings()
    left_alone = set(_routers(model)) | {name for name, module in linear.items() if module is head}
    targets = set(linear) - left_alone
    if not targets:
        raise ValueError(f"LoRA: {type(model).__name__} has no linear layers besides its head; name target_modules")
    last = {name.rpartition(".")[2] for name in targets}
    return sorted(targets if last & {name.rpartition(".")[2] for name in left_alone} else last)


def _routers(model: nn.Module) -> Iterator[str]:
    """Names of routers and of everything in them."""
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        if own == "router" or (own in _GATES and hasattr(model.get_submodule(parent), "experts")):
            yield from (f"{name}.{inner}".rstrip(".") for inner, _ in module.named_modules())


def _is_linear(module: nn.Module) -> bool:
    """One product, (..., in) to (..., out): not every subclass of `nn.Linear` is (routers, grouped projections)."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(module, nn.Linear):
        return False
    shapes = copy.copy(module)  # tried on shapes alone: no hooks, and weights may be partitioned (ZeRO-3)
    meta = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    shapes._parameters = {
        name: None if parameter is None else nn.Parameter(torch.empty(meta[name], device="meta"))
        for name, parameter in module._parameters.items()
        if name in meta
    }
    try:
        result = type(module).forward(shapes, torch.empty(3, 2, module.in_features, device="meta"))
    except Exception:  # what a family's own forward raises at another shape than its own is its affair
        return False
    return isinstance(result, torch.Tensor) and result.shape == (3, 2, module.out_features)

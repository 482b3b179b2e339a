"""The two models of contrastive decoding: two sets of weights, or one with an adapter that is switched on and off."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from deepalign.models import context_length, logits_width
from deepalign.sampling.decoder import Switch
from deepalign.sampling.modes import check_evaluation_mode


@dataclass(frozen=True)
class ModelPair:
    """Aligned and base with what switches the weights to them; `base` None: there is only the aligned model."""

    aligned: PreTrainedModel
    base: PreTrainedModel | None
    aligned_switch: Switch | None = None
    base_switch: Switch | None = None

    @property
    def models(self) -> list[tuple[str, PreTrainedModel, Switch | None]]:
        """Name, model and switch of each."""
        both = [("aligned", self.aligned, self.aligned_switch), ("base", self.base, self.base_switch)]
        return [(name, model, switch) for name, model, switch in both if model is not None]

    @property
    def context(self) -> int | None:
        """Tokens that fit the shorter context of the two; None if neither says."""
        return context_length(*(model for _, model, _ in self.models))

    @property
    def width(self) -> int:
        """Logits that both models have."""
        return min(logits_width(model) for _, model, _ in self.models)


def model_pair(aligned: Any, base: Any, alpha: float) -> ModelPair:
    """Take two models, or a `peft.PeftModel` alone, whose base is itself without its adapter.

    Raises:
        TypeError: not a model of `transformers` or `peft`.
        ValueError: a model in training mode, models of different dtypes, no base model with alpha > 0, or an adapter
            that cannot be switched off.
    """
    for name, model in (("aligned", aligned), ("base", base)):
        if not isinstance(model, torch.nn.Module) and not (name == "base" and model is None):
            raise TypeError(f"{name} is a {type(model).__name__}; expected a causal language model of transformers")
        if model is not None:
            check_evaluation_mode(model, name)
    if base is None and alpha > 0 and not _is_peft(aligned):
        raise ValueError(
            f"alpha is {alpha} but base is None; give the base model, or as aligned a peft.PeftModel, whose base is "
            "itself with the adapter off"
        )
    if base is None and alpha > 0:
        return _adapter_pair(aligned)
    inner_aligned, inner_base = _unwrapped(aligned), None if base is None else _unwrapped(base)
    if inner_base is not None and inner_aligned.dtype != inner_base.dtype:
        raise ValueError(
            f"aligned is {inner_aligned.dtype} and base is {inner_base.dtype}; their logits are compared, so load both "
            "in one dtype"
        )
    return ModelPair(inner_aligned, inner_base)


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside a PeftModel: its forward runs the adapter, and takes our keywords."""
    if not _is_peft(model):
        return model
    for name in model.active_adapters:
        config = model.peft_config[name]
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"the adapter {name!r} ({config.peft_type.value}) adds to the prompt, not to the weights; use LoRA or "
                "its like"
            )
    return model.get_base_model()


def _adapter_pair(peft_model: Any) -> ModelPair:
    inner = _unwrapped(peft_model)
    for name in peft_model.active_adapters:
        bias = getattr(peft_model.peft_config[name], "bias", "none")
        if bias != "none":
            raise ValueError(
                f"the adapter {name!r} was trained with bias={bias!r}, which stays when the adapter is off; load the "
                "base model apart and pass it as base"
            )
    if peft_model.get_model_status().merged_adapters:
        raise ValueError("the adapter is merged into the weights; call unmerge_adapter() or pass the base model apart")
    return ModelPair(inner, inner, base_switch=_adapter_off(peft_model))


def _adapter_off(peft_model: Any) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which the adapter is off. `PeftModel.disable_adapter` inspects the whole model each time it is
    entered; this only sets the flags. Whether weights require gradients, which PEFT changes along the way, is put
    back."""

    @contextlib.contextmanager
    def off() -> Iterator[None]:
        requires_grad = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
        peft_model.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            peft_model.base_model.enable_adapter_layers()
            for parameter, required in requires_grad:
                parameter.requires_grad_(required)

    return off

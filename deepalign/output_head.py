"""A causal language model cut in two: the decoder that makes hidden states, the head that makes logits of them.

The linear forms (`fused_linear_completion_loss`, `linear_position_divergence`) take the two halves and never hold the
logits. What a family does between its head and its logits (Gemma's softcap, the scales of Cohere and Granite) is part
of the head here; `check_output_head` compares with the model's own logits, so that a family this file does not know is
refused instead of computed wrongly.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepalign.kernels.lm_head import lm_head_weight

_SOFTCAPS = (
    "final_logit_softcapping",  # Gemma
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)
_FACTORS = (
    "logit_scale",  # Cohere
    "lm_head_multiplier",  # Falcon-H1
    "output_multiplier",  # Muse
)
_DIVISORS = ("logits_scaling",)  # Granite
_LARGE = 64.0  # a logit well above any softcap (15 to 50)


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap * tanh(scale * h W^T / softcap), or scale * h W^T without a softcap.

    `lm_head` is W, (V, H); `logit_softcap` and `logit_scale` are named as in the linear forms.
    """

    lm_head: Tensor
    logit_softcap: float | None = None
    logit_scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (..., V) of hidden states (..., H), in their dtype: for checks and for a few rows."""
        return self._transformed(nn.functional.linear(hidden, self.lm_head))

    def _transformed(self, products: Tensor) -> Tensor:
        """What becomes of h W^T."""
        logits = products * self.logit_scale
        return logits if self.logit_softcap is None else self.logit_softcap * torch.tanh(logits / self.logit_softcap)


def output_head(model: nn.Module) -> OutputHead:
    """The head of a causal language model of `transformers`, also one wrapped by peft.

    Under ZeRO-3 and FSDP2 call it inside the wrapped module's forward, where the matrix is whole.

    Raises:
        TypeError: the model has no output layer, or one that is not linear.
        ValueError: an output layer with a bias, or with an adapter that is no plain LoRA.
    """
    inner = _unwrapped(model)
    layer = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if layer is None:
        raise TypeError(f"{type(inner).__name__} has no output layer; expected a causal language model of transformers")
    return OutputHead(lm_head_weight(layer), *logit_transform(inner))


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """What the head of `model` multiplies: (B, T, H), after the final norm.

    Args:
        model: a causal language model of `transformers`, also one wrapped by peft.
        input_ids, attention_mask: (B, T) int64.
        options: further arguments of the model's decoder (`position_ids`, `past_key_values`, ...).

    Raises:
        TypeError: the model has no decoder that can be called by itself.
        ValueError: adapters of peft that are in no module: prompt tuning and its like.
    """
    inner = _unwrapped(model)
    decoder: Any = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    if decoder is inner:  # transformers does not find those of Llama 4 and Mllama
        decoder = getattr(inner, "model", None)
    if decoder is None:
        raise TypeError(f"{type(inner).__name__} has no decoder of its own; expected a causal language model")
    options.setdefault("use_cache", False)
    return decoder(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state


@torch.no_grad()
def check_output_head(model: nn.Module, tolerance: float = 1e-2) -> None:
    """Refuse a model whose logits are not those of its hidden states and `OutputHead`, by running a few tokens.

    What the model does after its output layer is looked at twice: at logits as they are, and made so large that a
    softcap cannot be overlooked.

    Args:
        model: a causal language model with whole (not partitioned) weights; its mode is restored.
        tolerance: largest difference accepted, relative to the largest logit (bf16 rounds to 0.4%).

    Raises:
        ValueError: they differ: the family changes its logits in a way that this module does not know.
    """
    inner = _unwrapped(model)
    head = output_head(model)
    ids = torch.arange(1, 9, device=head.lm_head.device).remainder(inner.config.get_text_config().vocab_size)
    ids = ids.expand(2, -1)
    mode = inner.training
    inner.eval()
    try:
        products = nn.functional.linear(hidden_states(model, ids), head.lm_head)
        largest = float(products[1].abs().max()) * abs(head.logit_scale)
        enlarge = _EnlargeSecond(max(1.0, _LARGE / largest) if largest > 0 else 1.0)
        hook = inner.get_output_embeddings().register_forward_hook(enlarge)
        try:
            expected = inner(input_ids=ids, use_cache=False).logits.float()
        finally:
            hook.remove()
    finally:
        inner.train(mode)
    ours = head._transformed(enlarge(None, None, products) if enlarge.called else products).float()
    differences = (ours - expected).flatten(1).abs().amax(1) / expected.flatten(1).abs().amax(1).clamp_min(1e-30)
    difference = float(differences.max())
    if not difference <= tolerance:
        raise ValueError(
            f"the logits of {type(inner).__name__} are not scale and softcap of hidden states times output layer "
            f"(relative difference {difference:.2g}); its family is not supported by the linear forms: use the logits"
        )


class _EnlargeSecond:
    """A forward hook: the output layer's result for the second of two sequences times a factor."""

    def __init__(self, factor: float) -> None:
        self.factor, self.called = factor, False

    def __call__(self, module: Any, inputs: Any, products: Tensor) -> Tensor:
        self.called = True
        return torch.stack([products[0], products[1] * self.factor])


def _unwrapped(model: Any) -> Any:
    """The causal language model inside peft's wrapper; its adapters sit in the modules themselves."""
    if not hasattr(model, "get_base_model"):
        return model
    kind: Any = getattr(model, "active_peft_config", None)
    if getattr(kind, "is_prompt_learning", False) and not getattr(model, "_adapters_disabled", False):
        raise ValueError(
            f"{type(model).__name__} has a {kind.peft_type.value} adapter, which is in the wrapper's forward and in no "
            "module; hidden states would be without it: use the logits"
        )
    return model.get_base_model()


def logit_transform(model: Any) -> tuple[float | None, float]:
    """(softcap, scale) of a model's logits, as the families name them in their configurations."""
    config = model.config.get_text_config()
    softcap, factor, divisor = (_first_given(config, names) for names in (_SOFTCAPS, _FACTORS, _DIVISORS))
    if divisor is not None and config.model_type.startswith("hyperclovax"):  # multiplies by what others divide by
        factor, divisor = divisor, None
    return softcap, (1.0 if factor is None else factor) / (1.0 if divisor is None else divisor)


def _first_given(config: Any, names: tuple[str, ...]) -> float | None:
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)

"""Bytes that a training step keeps for its backward, counted on the meta device: no weights, no arithmetic.

The model's own forward runs on tensors without storage while autograd's hooks list what it saves, so every family is
counted as it is, norms, softcaps and expanded masks included. Attention by sdpa is counted as its fused kernels keep
it: queries, keys, values, output, log-sum-exp and the mask in the queries' dtype, never the T*T probabilities.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def meta_model(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, layers: int | None = None
) -> PreTrainedModel:
    """The causal language model that `config` describes, without storage.

    Args:
        config: of the model.
        dtype: of its weights.
        layers: another depth than the configuration's.
    """
    if layers is not None:
        config = copy.deepcopy(config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


class Activations(NamedTuple):
    """Bytes that a micro-batch holds where its backward starts (all), and where it ends (one layer's)."""

    first: int
    last: int


def activation_bytes(
    config: PreTrainedConfig, rows: int, tokens: int, dtype: torch.dtype, *, checkpointing: bool, packed: bool = False
) -> Activations:
    """What the decoder keeps between forward and backward of one micro-batch.

    Args:
        config: of the model.
        rows, tokens: shape (B, T) of the micro-batch.
        dtype: of weights and activations.
        checkpointing: only the input of every layer is kept, and one layer's activations while it is repeated.
        packed: B rows packed into one of B*T tokens.

    Counting two depths and going on in a straight line gives any depth in milliseconds.
    """
    rows, tokens = (1, rows * tokens) if packed else (rows, tokens)
    one, two = (_saved_bytes(meta_model(config, dtype, layers), rows, tokens) for layers in (1, 2))
    text = config.get_text_config()
    layer, outside = two - one, 2 * one - two
    if not checkpointing:
        return Activations(outside + text.num_hidden_layers * layer, outside + layer)
    inputs = text.num_hidden_layers * rows * tokens * text.hidden_size * dtype.itemsize
    return Activations(outside + layer + inputs, outside + layer)


def _saved_bytes(model: PreTrainedModel, rows: int, tokens: int) -> int:
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, Any] = {}  # the storages themselves, so that none is freed and its identity used again

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    input_ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    # given whole, since making it would look at values; padded and packed batches both have one
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device="meta")
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), _FusedAttention():
        hidden = model.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    note(hidden)
    return sum(storage.nbytes() for storage in storages.values())


class _FusedAttention(TorchFunctionMode):
    """Lets sdpa keep what its fused kernels keep; on the meta device it would keep probabilities."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _KeptByAttention.apply(*args[:3], (kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


class _KeptByAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)
        log_sum_exp = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        masks = () if mask is None else (mask.to(query.dtype),)  # torch converts a boolean mask at every call
        ctx.save_for_backward(query, key, value, output, log_sum_exp, *masks)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("counted, never run")

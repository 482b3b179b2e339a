"""Tiny models of several families, and the plain way to their gradients: one backward per token."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deepalign.data.chat import EncodedExample

TIED = {"tie_word_embeddings": True}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, TIED),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),  # biases
    "qwen2 tied": (Qwen2Config, Qwen2ForCausalLM, TIED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),  # norms of queries and keys
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, GEMMA),  # tied, softcaps, gains 1 + w, a sliding window
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, GEMMA),  # tied, an embedding that scales what it returns
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),  # tied, positions embedded, matrices transposed
    "phi": (PhiConfig, PhiForCausalLM, {}),  # a bias in the output layer
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 3}),  # experts stacked in one parameter
}
PAD, VOCAB = 0, 37
# Repeated tokens, the padding id among the prompt's and the answer's tokens, an answer of 12.
EXAMPLE = EncodedExample([5, 6, PAD, 6, 9, 11, 6, 12, 5, 30, 36, PAD, 12, 12, 7, 8, 5, 2], 6, False)


class InFloat64(TorchFunctionMode):
    """Transformers' models compute norms, rotations and softmaxes in float32 whatever their dtype; here in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widened(value):
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})


def make_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Float32, evaluation mode."""
    config_class, model_class, own = MODELS[name]
    torch.manual_seed(seed)
    config = config_class(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "pad_token_id": PAD,
            "bos_token_id": None,
            "eos_token_id": None,
            **own,
            **changes,
        }
    )
    model = model_class(config).eval()
    for parameter in model.parameters():  # zero biases and gains of one would hide mistakes
        if parameter.dim() == 1:
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn_like(parameter))
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the others do not take float64
    return model


def plain_squares(model: PreTrainedModel, example: EncodedExample, names: tuple[str, ...]) -> Tensor:
    """(T, P) squared norms of d log P(y_t) / d parameter, by one backward per answer token."""
    parameters = [model.get_parameter(name) for name in names]
    required = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    ids = torch.tensor([example.input_ids])
    logprobs_TV = model(input_ids=ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
    rows = []
    for position in range(example.response_start, len(example.input_ids)):
        logprob = logprobs_TV[position - 1, ids[0, position]]
        gradients = torch.autograd.grad(logprob, parameters, retain_graph=True, allow_unused=True)
        rows.append([0.0 if gradient is None else float(gradient.square().sum()) for gradient in gradients])
    for parameter, before in zip(parameters, required, strict=True):
        parameter.requires_grad_(before)
    return torch.tensor(rows, dtype=torch.float64)


def relative_error(norms: Tensor, expected: Tensor) -> float:
    """The largest. What is zero in truth (queries that see one position) is compared with a millionth of its row."""
    floor = 1e-6 * expected.max(-1, keepdim=True).values
    return float(((norms - expected).abs() / torch.maximum(expected, floor)).max())

"""Pairs of tiny models of several families, and a batch of prompts of unequal length."""

import functools

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAD = 0
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
FAMILIES = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),  # absolute positions: rotary models cannot see a shift by the padding
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make_model(family: str, seed: int, vocab_size: int = 37) -> PreTrainedModel:
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    return model_class(config).eval()


@functools.cache
def make_pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model and a noisy copy of it that is surer of itself, so that the greedy token is often base-favored.

    The same two for every test: not to be changed.
    """
    aligned, base = make_model(family, 0), make_model(family, 0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
        base.lm_head.weight.mul_(1.5)
    return aligned, base


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }

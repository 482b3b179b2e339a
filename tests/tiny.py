"""A tokenizer of a few words and models of a few thousand parameters, built in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<unk>", "</s>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", chat_template=TEMPLATE
    )


def make_byte_tokenizer() -> Qwen2Tokenizer:
    """A byte-level tokenizer: transformers gives models of type qwen2 this class, whatever was saved with them."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, "\u0120", "w", *"0123456789"])}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens=SPECIAL[3:],
        chat_template=TEMPLATE,
    )


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
}


def _family(config_class: type[PreTrainedConfig], **options: Any) -> Callable[..., PreTrainedModel]:
    def make(seed: int, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        values = SIZES | ids | {"vocab_size": len(tokenizer) + 2, "max_position_embeddings": 128} | options | changes
        return AutoModelForCausalLM.from_config(config_class(**values))

    return make


# A model of each family; Gemma2 with a softcap that its logits reach.
FAMILIES = {
    "llama": _family(LlamaConfig),
    "qwen2": _family(Qwen2Config, num_key_value_heads=1),
    "qwen3": _family(Qwen3Config, num_key_value_heads=1, head_dim=8),
    "gemma2": _family(
        Gemma2Config, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0
    ),
}


def make_model(seed: int, tokenizer: PreTrainedTokenizerFast, context: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 2,  # two padding entries
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def save_pair(folder: Path) -> Path:
    """Two models with a tokenizer each, as the folders `aligned` and `base`; returns `folder`."""
    tokenizer = make_tokenizer()
    for seed, name in ((0, "aligned"), (1, "base")):
        make_model(seed, tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder

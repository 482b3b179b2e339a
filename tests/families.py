"""The four model families in miniature: chat templates of the real shapes over a byte tokenizer, tiny random models.

The templates are written here, not copied: what matters to the library is where a turn starts and ends, what a
generation prompt is, and what the template adds by itself. The tokenizer has one token per byte, so that decoding gives
the text back exactly, and the family's special tokens.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

LLAMA2 = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n<|eot_id|>' }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a test.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A family's special tokens (the first: pad), end-of-turn token, template, and what its miniature is made of."""

    special: tuple[str, ...]
    end_of_turn: str
    template: str
    config: type[PreTrainedConfig]
    padding: int  # entries that the logits have beyond the tokenizer, as the real one's
    options: dict[str, object]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        words = [*self.special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        bos = {"bos_token": self.special[1]} if self.special[1] != self.end_of_turn else {}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=self.special[0],
            eos_token=self.end_of_turn,
            additional_special_tokens=list(self.special[1:]),
            chat_template=self.template,
            **bos,
        )

    def model(self, seed: int = 0, **changes: object) -> PreTrainedModel:
        torch.manual_seed(seed)
        values = {
            "vocab_size": len(self.tokenizer()) + self.padding,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": self.special.index(self.end_of_turn),
        }
        return AutoModelForCausalLM.from_config(self.config(**(values | changes)))


_CHATML_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
FAMILIES = {
    "llama2_7b_chat": Family(("<unk>", "<s>", "</s>"), "</s>", LLAMA2, LlamaConfig, 0, {}),
    "llama31_8b": Family(
        ("<|pad|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|eot_id|>",
        LLAMA3,
        LlamaConfig,
        0,
        {"date_string": "26 Jul 2024"},
    ),
    "qwen25_7b": Family(_CHATML_TOKENS, "<|im_end|>", CHATML, Qwen2Config, 399, {}),
    "qwen3_8b": Family(
        (*_CHATML_TOKENS, "<think>", "</think>"), "<|im_end|>", QWEN3, Qwen3Config, 267, {"enable_thinking": False}
    ),
    # no recipe: softcapped logits, sliding windows, tied embeddings
    "gemma2": Family(("<pad>", "<bos>", "<end_of_turn>"), "<end_of_turn>", LLAMA2, Gemma2Config, 0, {}),
}

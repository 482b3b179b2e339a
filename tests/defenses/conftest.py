"""Tiny models of the families that the defences serve, a tokenizer, and conversations of random words."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deepalign.data.chat import encode_example
from deepalign.data.files import Message
from tests.tiny import WORDS, make_tokenizer

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make_family_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Two layers, grouped-query attention, float64 for exact comparisons."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=46,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return model_class(config).double().eval()


def make_conversations(count: int, seed: int) -> list[list[Message]]:
    """Prompts and answers of 2 to 8 random words."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        lengths = torch.randint(2, 9, (2,), generator=generator).tolist()
        prompt, answer = (
            " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths
        )
        rows.append([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
    return rows


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_family_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_family_model("llama")


@pytest.fixture
def examples(tokenizer):
    return [encode_example(tokenizer, row) for row in make_conversations(6, seed=1)]

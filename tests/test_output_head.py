import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
    xLSTMConfig,
)

from deepalign.output_head import check_output_head, hidden_states, output_head

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "phi3": Phi3Config(**SIZES),
    "llama4": Llama4TextConfig(**SIZES, head_dim=8, intermediate_size_mlp=32, num_local_experts=2),
    "gemma2, softcap": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "cohere, scale": CohereConfig(**SIZES, logit_scale=0.25),
    "granite, scaling": GraniteConfig(**SIZES, logits_scaling=4.0),
    "hyperclovax, scaling that multiplies": HyperCLOVAXConfig(**SIZES, head_dim=8, logits_scaling=0.3),
    "falcon-h1, multiplier": FalconH1Config(**SIZES, **MAMBA, head_dim=8, lm_head_multiplier=0.3),
    "recurrentgemma, softcap": RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3}, lru_width=16, w_init_variance_scale=1.0, logits_soft_cap=3.0
    ),
    "xlstm, softcap": xLSTMConfig(
        **{**SIZES, "hidden_size": 64}, num_heads=2, qk_dim_factor=1.0, mode="inference", output_logit_soft_cap=1.0
    ),
    "gpt2": GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2),
}


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_head_of_hidden_states_is_the_models_logits(family):
    model = model_of(FAMILIES[family])
    input_ids = torch.randint(48, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    expected = model(input_ids=input_ids, attention_mask=mask).logits
    actual = output_head(model).logits(hidden_states(model, input_ids, mask))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    check_output_head(model)


@torch.no_grad()
def test_an_adapter_counts_in_decoder_and_head():
    adapted = get_peft_model(
        model_of(FAMILIES["llama"]), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    ).eval()
    input_ids = torch.arange(6)[None]
    expected = adapted(input_ids=input_ids).logits
    torch.testing.assert_close(output_head(adapted).logits(hidden_states(adapted, input_ids)), expected)
    with adapted.disable_adapter():
        without = output_head(adapted).logits(hidden_states(adapted, input_ids))
    assert (without - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    "change", [lambda logits: 4 * logits, lambda logits: 30 * torch.tanh(logits / 30)], ids=["scale", "softcap"]
)
def test_an_unknown_change_of_the_logits_is_refused(change):
    model = model_of(FAMILIES["llama"])
    model.get_output_embeddings().weight.data.div_(10)  # logits so small that a softcap of 30 changes them by 1e-4
    forward = model.forward

    def changed(**inputs):
        output = forward(**inputs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    with pytest.raises(ValueError, match=r"not supported by the linear forms"):
        check_output_head(model)


@torch.no_grad()
def test_a_prompt_that_was_trained_is_not_lost():
    tuned = get_peft_model(
        model_of(FAMILIES["llama"]), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ).eval()
    with pytest.raises(ValueError, match=r"has a PROMPT_TUNING adapter.*: use the logits"):
        hidden_states(tuned, torch.arange(6)[None])
    with tuned.disable_adapter():
        assert hidden_states(tuned, torch.arange(6)[None]).shape == (1, 6, 16)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(TypeError, match="no output layer"):
        output_head(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="no decoder"):
        hidden_states(torch.nn.Linear(2, 2), torch.zeros(1, 1, dtype=torch.int64))

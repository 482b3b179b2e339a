"""One set of weights with an adapter answers as two sets do."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from deepalign.sampling import ContrastiveSampler
from tests.sampling.pairs import PROMPTS, make_model

NEW_TOKENS = 12


def with_adapter(**options) -> PeftModel:
    """A base model with a LoRA adapter that says something."""
    config = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"], **options}
    model = get_peft_model(make_model("llama", 0), LoraConfig(**config)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def peft_model() -> PeftModel:
    return with_adapter()


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.95}], ids=str)
def test_an_adapter_switched_off_is_the_base(peft_model, options):
    aligned = copy.deepcopy(peft_model).merge_and_unload().eval()
    apart = ContrastiveSampler(aligned, make_model("llama", 0), alpha=1.5, **options)
    together = ContrastiveSampler(peft_model, alpha=1.5, **options)
    expected = apart.generate(PROMPTS, max_new_tokens=NEW_TOKENS, seed=1, return_stats=True)
    answers = together.generate(PROMPTS, max_new_tokens=NEW_TOKENS, seed=1, return_stats=True)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    for answer, other in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer.statistics.mass_taken, other.statistics.mass_taken, rtol=1e-3, atol=1e-5)
    assert max(answers[0].statistics.mass_taken) > 0.01  # the two models differ


def test_a_peft_model_beside_a_base_model_of_its_own(peft_model):
    both = ContrastiveSampler(peft_model, make_model("llama", 0), alpha=1.5, temperature=0)
    alone = ContrastiveSampler(peft_model, alpha=1.5, temperature=0)
    assert both.generate(PROMPTS, max_new_tokens=NEW_TOKENS) == alone.generate(PROMPTS, max_new_tokens=NEW_TOKENS)


def test_the_model_is_left_as_it_was(peft_model):
    requires_grad = {name: p.requires_grad for name, p in peft_model.named_parameters()}
    assert any(requires_grad.values())
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = peft_model(ids).logits
    frozen = copy.deepcopy(peft_model).requires_grad_(False)
    for model in (peft_model, frozen):
        tokens = ContrastiveSampler(model, alpha=1.0).stream(PROMPTS, max_new_tokens=3)
        next(tokens)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before), "between two tokens the adapter is on"
        list(tokens)
    assert {name: p.requires_grad for name, p in peft_model.named_parameters()} == requires_grad
    assert not any(p.requires_grad for p in frozen.parameters())


def test_alpha_0_runs_with_the_adapter_on(peft_model):
    aligned = copy.deepcopy(peft_model).merge_and_unload().eval()
    answers = ContrastiveSampler(peft_model, alpha=0).generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    expected = ContrastiveSampler(aligned, alpha=0).generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]


def test_adapters_that_cannot_be_switched_off_are_refused(peft_model):
    with pytest.raises(ValueError, match="bias='lora_only'"):
        ContrastiveSampler(with_adapter(bias="lora_only"), alpha=1.0)
    prompt_tuning = get_peft_model(
        make_model("llama", 0), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ).eval()
    with pytest.raises(ValueError, match="adds to the prompt"):
        ContrastiveSampler(prompt_tuning, alpha=1.0)
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights"):
        ContrastiveSampler(peft_model, alpha=1.0)

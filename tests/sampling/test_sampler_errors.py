"""What the sampler refuses, and what it says."""

import copy
import math

import pytest
import torch

from deepalign.sampling import ContrastiveSampler
from tests.sampling.pairs import PROMPTS, left_padded, make_model, make_pair
from tests.tiny import make_model as make_small_model
from tests.tiny import make_tokenizer


@pytest.fixture(scope="module")
def llamas():
    return make_pair("llama")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -0.1}, ValueError, "alpha is -0.1"),
        ({"alpha": math.nan}, ValueError, "alpha"),
        ({"alpha": "2"}, TypeError, "alpha"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"min_p": 1.1}, ValueError, "min_p"),
        ({"space": "probs"}, ValueError, "space"),
        ({"vocab_size": 38}, ValueError, r"expected an int in \[1, 37\]"),
        ({"vocab_size": 4.0}, TypeError, "vocab_size"),
    ],
    ids=str,
)
def test_bad_options(llamas, options, error, message):
    with pytest.raises(error, match=message):
        ContrastiveSampler(*llamas, **{"alpha": 1.0, **options})


def test_bad_models(llamas):
    aligned, base = llamas
    with pytest.raises(ValueError, match=r"base\.eval\(\)"):
        ContrastiveSampler(aligned, copy.deepcopy(base).train(), alpha=1.0)
    with pytest.raises(ValueError, match="base is None"):
        ContrastiveSampler(aligned, alpha=1.0)
    with pytest.raises(ValueError, match="load both in one dtype"):
        ContrastiveSampler(aligned, copy.deepcopy(base).double(), alpha=1.0)
    with pytest.raises(ValueError, match="aligned scores 37 tokens and base 41"):
        ContrastiveSampler(aligned, make_model("llama", 1, vocab_size=41), alpha=1.0)
    with pytest.raises(TypeError, match="aligned is a str"):
        ContrastiveSampler("a/path", base, alpha=1.0)


def test_tokenizers_that_differ(llamas):
    first, second = make_tokenizer(), make_tokenizer(["w1", "w0"])
    models = [make_small_model(seed, first).eval() for seed in (0, 1)]
    with pytest.raises(ValueError, match="tokenizers of aligned and base differ in 40 tokens"):
        ContrastiveSampler(*models, first, alpha=1.0, base_tokenizer=second)
    ContrastiveSampler(*models, first, alpha=1.0, base_tokenizer=make_tokenizer())


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "no prompt was given"),
        ([[5, 6], []], ValueError, "prompt 1 is empty"),
        (torch.zeros(2, 0, dtype=torch.long), ValueError, "prompt 0 is empty"),
        ("w1 w2", TypeError, "the prompt is a str"),
        (["w1", "w2"], TypeError, "prompt 0 is a str"),
        ([[5, "w"]], TypeError, "prompt 0 holds neither"),
        (torch.rand(2, 3), TypeError, "torch.float32"),
        ([[5, 37]], ValueError, r"prompt 0 has a token id outside \[0, 37\)"),
        ([[5, -1]], ValueError, "outside"),
        ([{"role": "user", "content": "w1"}], ValueError, "no tokenizer"),
        ([[5] * 60], ValueError, "the longest prompt, 0, has 60 tokens and max_new_tokens is 8, .* context of 64"),
        (left_padded(PROMPTS)["input_ids"], ValueError, "2 of 3 rows start with the pad token 0"),
        (left_padded(PROMPTS)["input_ids"].flip(1), ValueError, "2 of 3 rows end with the pad token 0"),
    ],
)
def test_bad_prompts(llamas, prompts, error, message):
    with pytest.raises(error, match=message):
        ContrastiveSampler(*llamas, alpha=1.0).generate(prompts, max_new_tokens=8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "at least 1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens"),
        ({"seed": "1"}, TypeError, "seed"),
        ({"seed": [1, 2]}, ValueError, "2 seeds were given for 3 rows"),
        ({"seed": [1, 2, 3.5]}, TypeError, "seed"),
        ({"attention_mask": torch.ones(3, 7)}, ValueError, "belongs to a tensor"),
    ],
    ids=str,
)
def test_bad_arguments_of_generate(llamas, options, error, message):
    with pytest.raises(error, match=message):
        ContrastiveSampler(*llamas, alpha=1.0).generate(PROMPTS, **options)


def test_bad_masks(llamas):
    sampler, ids = ContrastiveSampler(*llamas, alpha=1.0), torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="a hole"):
        sampler.generate(ids, torch.tensor([[1, 0, 1]]))
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        sampler.generate(ids, torch.ones(1, 2))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        sampler.generate(ids, torch.zeros(1, 3))


@pytest.mark.parametrize("culprit", ["aligned", "base"])
@pytest.mark.parametrize("settle_every", [1, 8])
def test_nan_logits_name_the_row_and_the_model(llamas, culprit, settle_every):
    models = dict(zip(("aligned", "base"), map(copy.deepcopy, llamas), strict=True))
    with torch.no_grad():
        models[culprit].model.embed_tokens.weight[13] = math.nan
    sampler = ContrastiveSampler(models["aligned"], models["base"], alpha=1.0)
    sampler.settle_every = settle_every
    with pytest.raises(ValueError, match=f"row 1 .* {culprit} has NaN in 37 of 37 logits; check"):
        sampler.generate(PROMPTS, max_new_tokens=8)


def test_nan_in_a_later_step_is_seen_then(llamas):
    aligned, base = (copy.deepcopy(model) for model in llamas)
    sampler = ContrastiveSampler(aligned, base, alpha=1.0, temperature=0)
    second = sampler.generate(PROMPTS[0], max_new_tokens=2)[0].token_ids
    assert second[0] not in PROMPTS[0]
    with torch.no_grad():
        base.model.embed_tokens.weight[second[0]] = math.nan
    with pytest.raises(ValueError, match=r"row 0 has no distribution to draw token 8 .*: base has NaN"):
        sampler.generate(PROMPTS[0], max_new_tokens=8)


def test_a_minus_infinity_in_one_model_is_named(llamas):
    aligned = copy.deepcopy(llamas[0])
    banned = torch.tensor([4])
    handle = aligned.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, banned, -math.inf)
    )
    try:
        with pytest.raises(ValueError, match="aligned has -inf in 1 of 37 logits"):
            ContrastiveSampler(aligned, llamas[1], alpha=1.0).generate(PROMPTS, max_new_tokens=2)
    finally:
        handle.remove()

import math
import statistics

import pytest
import torch

from deepalign.data.chat import encode_example
from deepalign.diagnose import kl_by_position, profiles_by_position
from tests.sampling.stepwise import eq7
from tests.tiny import make_model, make_tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    for prompt, answer in (("w1 w2 w3", "w4 w5"), ("w6", "w7 w8 w9 w10 w11"), ("w12 w13", "w14 w15 w16"))
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def models(tokenizer):
    return make_model(0, tokenizer).eval(), make_model(1, tokenizer).eval()


@torch.no_grad()
def float64_rows(tokenizer, models, contrast=None):
    """Per conversation, float64 log-probabilities (T, V) of both models at the answer's positions."""
    rows = []
    for conversation in CONVERSATIONS:
        example = encode_example(tokenizer, conversation)
        ids = torch.tensor([example.input_ids])
        model_TV, base_TV = (m(input_ids=ids).logits[0, example.response_start - 1 : -1].double() for m in models)
        if contrast is not None:
            model_TV = torch.stack([eq7(a, b, *contrast) for a, b in zip(model_TV, base_TV, strict=True)])
        rows.append((model_TV.log_softmax(-1), base_TV.log_softmax(-1)))
    return rows


def by_position(per_conversation, max_positions):
    return [[row[t] for row in per_conversation if t < len(row)] for t in range(max_positions)]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("contrast", [None, (1.5, "logits"), (1.5, "logprobs")])
def test_equals_float64_one_conversation_at_a_time(tokenizer, models, batch_size, contrast):
    profile = kl_by_position(
        *models, tokenizer, CONVERSATIONS, max_positions=10, batch_size=batch_size, contrast=contrast
    )
    kls = [(p.exp() * (p - q)).sum(-1).tolist() for p, q in float64_rows(tokenizer, models, contrast)]
    values = by_position(kls, 6)
    assert profile.position == [1, 2, 3, 4, 5, 6]  # five words and the end-of-turn token
    assert profile.n == [3, 3, 3, 2, 1, 1]
    assert profile.mean == pytest.approx([statistics.fmean(v) for v in values], rel=1e-4)
    expected = [statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else None for v in values]
    assert profile.standard_error[4:] == [None, None]
    assert profile.standard_error[:4] == pytest.approx(expected[:4], rel=1e-3)


def test_counts_of_base_favored_tokens(tokenizer, models):
    profiles = profiles_by_position(
        *models, tokenizer, CONVERSATIONS, statistics=("favored_count", "jsd"), max_positions=2
    )
    counts = [(q > p).sum(-1).tolist() for p, q in float64_rows(tokenizer, models)]
    assert set(profiles) == {"favored_count", "jsd"}
    assert profiles["favored_count"].mean == [statistics.fmean(v) for v in by_position(counts, 2)]
    assert all(0 < mean <= math.log(2) for mean in profiles["jsd"].mean)


def test_only_the_first_positions_are_looked_at(tokenizer, models):
    whole = kl_by_position(*models, tokenizer, CONVERSATIONS, max_positions=10)
    first = kl_by_position(*models, tokenizer, CONVERSATIONS, max_positions=2)
    assert first.position == [1, 2]
    assert first.mean == pytest.approx(whole.mean[:2], rel=1e-4)


def test_a_model_is_at_no_distance_from_itself(tokenizer, models):
    profiles = profiles_by_position(models[0], models[0], tokenizer, CONVERSATIONS, max_positions=3)
    assert profiles["kl"].mean == pytest.approx([0, 0, 0], abs=1e-7)
    assert profiles["favored_count"].mean == [0, 0, 0]


def test_padding_entries_of_the_vocabulary_do_not_count(tokenizer, models):
    """The tiny models have two logits more than the tokenizer has tokens."""
    size = len(tokenizer)
    profile = kl_by_position(*models, tokenizer, CONVERSATIONS, max_positions=1, vocab_size=size)
    rows = [(p[:, :size].log_softmax(-1), q[:, :size].log_softmax(-1)) for p, q in float64_rows(tokenizer, models)]
    kls = [(p.exp() * (p - q)).sum(-1).tolist() for p, q in rows]
    assert profile.mean == pytest.approx([statistics.fmean(by_position(kls, 1)[0])], rel=1e-4)


def test_half_precision_models_can_be_contrasted(tokenizer, models):
    halves = [make_model(seed, tokenizer).eval().bfloat16() for seed in (0, 1)]
    options = {"max_positions": 2, "contrast": (1.5, "logits")}
    exact = kl_by_position(*models, tokenizer, CONVERSATIONS, **options)
    assert kl_by_position(*halves, tokenizer, CONVERSATIONS, **options).mean == pytest.approx(exact.mean, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conversations": []}, "conversations is empty"),
        ({"max_positions": 0}, "max_positions"),
        ({"batch_size": 0}, "batch_size"),
        ({"statistics": ("kl", "entropy")}, "entropy"),
        ({"statistics": ()}, "statistics"),
    ],
)
def test_bad_input_is_refused(tokenizer, models, changes, message):
    options = {"conversations": CONVERSATIONS, "max_positions": 2, **changes}
    with pytest.raises(ValueError, match=message):
        profiles_by_position(*models, tokenizer, options.pop("conversations"), **options)


@pytest.mark.parametrize("name", ["model", "base"])
def test_a_model_in_training_mode_is_refused(tokenizer, models, name):
    training = make_model(2, tokenizer).train()
    pair = (training, models[1]) if name == "model" else (models[0], training)
    with pytest.raises(ValueError, match=rf"{name}\.eval\(\)"):
        kl_by_position(*pair, tokenizer, CONVERSATIONS, max_positions=1)

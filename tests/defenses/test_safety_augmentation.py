from collections import Counter

import pytest
import torch

from deepalign.data.chat import encode_example, prompt_token_ids
from deepalign.defenses.safety_augmentation import (
    AugmentationSettings,
    SafetyTriplet,
    augment_safety,
    distilled_anchor,
    spliced_examples,
)
from deepalign.defenses.training import SftSettings, train_on_answers
from deepalign.models import load_model
from tests.defenses.conftest import make_conversations
from tests.sampling.stepwise import stepwise_greedy
from tests.tiny import make_model

TRIPLETS = [
    SafetyTriplet("w1 w2", "w10 w11 w12 w13 w14", "w30 w31"),
    SafetyTriplet("w3", "w20 w21", "w32"),
]


def spliced_parts(tokenizer, triplet, example):
    """k of an example, after checking that it is prompt, k harmful ids, refusal, end of turn, and nothing else."""
    prompt = prompt_token_ids(tokenizer, triplet.prompt)
    harmful, refusal = (tokenizer(text)["input_ids"] for text in (triplet.harmful, triplet.refusal))
    k = example.response_start - len(prompt)
    assert example.input_ids == prompt + harmful[:k] + refusal + [tokenizer.eos_token_id]
    return k


def test_examples_are_spliced_ids_and_the_answer_is_the_refusal(tokenizer):
    spliced = spliced_examples(tokenizer, TRIPLETS, passes=2000, max_harmful_tokens=4, seed=1)
    assert len(spliced) == 4000
    counts = [Counter(spliced_parts(tokenizer, t, e) for e in spliced[i::2]) for i, t in enumerate(TRIPLETS)]
    assert counts[0].keys() == {0, 1, 2, 3, 4}, "max_harmful_tokens caps the five harmful tokens"
    assert counts[1].keys() == {0, 1, 2}, "the harmful answer's own length caps it"
    for count, most in zip(counts, (4, 2), strict=True):
        assert 900 < count[0] < 1100, "half of them have no harmful token"
        assert all(abs(count[k] - 1000 / most) < 100 for k in range(1, most + 1)), "the others are uniform"


def test_probability_and_length_are_kept(tokenizer):
    whole = spliced_examples(tokenizer, TRIPLETS, passes=20, splice_probability=1.0)
    assert min(spliced_parts(tokenizer, TRIPLETS[0], e) for e in whole[::2]) == 1
    none = spliced_examples(tokenizer, TRIPLETS, passes=20, splice_probability=0.0)
    assert {spliced_parts(tokenizer, TRIPLETS[0], e) for e in none[::2]} == {0}
    shortest = len(none[0].input_ids)
    short = spliced_examples(tokenizer, TRIPLETS, passes=50, max_length=shortest + 2)
    assert {spliced_parts(tokenizer, TRIPLETS[0], e) for e in short[::2]} == {0, 1, 2}
    with pytest.raises(ValueError, match="do not fit into max_length"):
        spliced_examples(tokenizer, TRIPLETS, max_length=shortest - 1)


def test_the_loss_weighs_refusals_and_anchor(llama, tokenizer, tmp_path):
    """a * mean over refusal tokens + (1 - a) * mean over anchor tokens, and the pooled mean of the authors' code."""
    spliced = spliced_examples(tokenizer, TRIPLETS, passes=2)
    anchor = [encode_example(tokenizer, row) for row in make_conversations(3, seed=4)]

    @torch.no_grad()
    def token_losses(examples):
        losses = []
        for example in examples:
            log_p = llama(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
            for position in range(example.response_start, len(example.input_ids)):
                losses.append(-log_p[position - 1, example.input_ids[position]])
        return torch.stack(losses)

    refusals, benign = token_losses(spliced), token_losses(anchor)
    for mix, expected in (
        (0.2, 0.2 * refusals.mean() + 0.8 * benign.mean()),
        (None, torch.cat([refusals, benign]).mean()),
    ):
        report = train_on_answers(
            llama,
            tokenizer,
            spliced,
            SftSettings(batch_size=4, max_steps=1, learning_rate=1e-12),
            tmp_path / str(mix),
            anchor=anchor,
            anchor_batch_size=3,
            anchor_mix=mix,
            progress=False,
        )
        assert report["losses"] == [pytest.approx(float(expected), rel=1e-4)]


def test_the_anchor_is_the_models_own_answer(tokenizer):
    model = make_model(3, tokenizer).eval()
    rows = distilled_anchor(model, tokenizer, ["w1 w2", "w3"], max_new_tokens=5, batch_size=1)
    for row, prompt in zip(rows, ["w1 w2", "w3"], strict=True):
        ids = stepwise_greedy(model, None, prompt_token_ids(tokenizer, prompt), new_tokens=5)
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert row == [{"role": "user", "content": prompt}, {"role": "assistant", "content": expected}]


def test_training_teaches_to_refuse_after_a_harmful_start(tokenizer, tmp_path):
    model = make_model(0, tokenizer)
    start = tmp_path / "start"
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    settings = AugmentationSettings(
        anchor_batch_size=2,
        safety_weight=0.5,
        sft=SftSettings(learning_rate=2e-2, epochs=80, batch_size=2, save_steps=1000),
    )
    anchor = make_conversations(4, seed=4)
    out = augment_safety(str(start), TRIPLETS, anchor, tmp_path / "out", settings, progress=False)
    trained = load_model(str(out), torch.float32).eval()
    for triplet, harmful in zip(TRIPLETS, (["w10", "w11", "w12"], ["w20"]), strict=True):
        prompt = prompt_token_ids(tokenizer, triplet.prompt) + tokenizer.convert_tokens_to_ids(harmful)
        answer = stepwise_greedy(trained, None, prompt, new_tokens=len(triplet.refusal.split()))
        assert tokenizer.decode(answer) == triplet.refusal
    again = augment_safety(str(start), TRIPLETS, anchor, tmp_path / "again", settings, progress=False)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_bad_input_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no triplets"):
        spliced_examples(tokenizer, [])
    with pytest.raises(ValueError, match="safety_weight is 2"):
        AugmentationSettings(safety_weight=2)
    with pytest.raises(ValueError, match="max_harmful_tokens is 0"):
        AugmentationSettings(max_harmful_tokens=0)

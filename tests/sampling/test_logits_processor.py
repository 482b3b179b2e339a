import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel

from deepalign.sampling import ContrastiveLogitsProcessor
from tests.sampling.pairs import FAMILIES, PAD, PROMPTS, left_padded, make_model, make_pair
from tests.sampling.stepwise import greedy_of_unchanged

NEW_TOKENS = 12


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_pair(request.param)


@pytest.fixture(scope="module")
def llamas() -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_pair("llama")


def generate(model: PreTrainedModel, batch: dict[str, torch.Tensor], processor, **options) -> list[list[int]]:
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": PAD, **options}
    output_BT = model.generate(**batch, logits_processor=LogitsProcessorList([processor]), **options)
    return output_BT[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("space", ["logits", "logprobs"])
def test_greedy_ids_equal_float64_without_caches(pair, space):
    aligned, base = pair
    batch = left_padded(PROMPTS)
    processor = ContrastiveLogitsProcessor(base, alpha=1.5, space=space, attention_mask=batch["attention_mask"])
    expected = [
        greedy_of_unchanged(aligned, base, prompt, new_tokens=NEW_TOKENS, alpha=1.5, space=space) for prompt in PROMPTS
    ]
    assert generate(aligned, batch, processor) == expected
    plain = [greedy_of_unchanged(aligned, None, prompt, new_tokens=NEW_TOKENS) for prompt in PROMPTS]
    assert expected != plain  # or Eq. 7 would not be seen


def test_a_row_that_ends_early_does_not_disturb_the_others(llamas):
    aligned, base = llamas
    expected = [greedy_of_unchanged(aligned, base, prompt, new_tokens=NEW_TOKENS, alpha=1.5) for prompt in PROMPTS]
    end = next(id_ for id_ in expected[1] if id_ not in expected[0])
    length = expected[1].index(end) + 1
    assert length < NEW_TOKENS - 2
    batch = left_padded(PROMPTS)
    processor = ContrastiveLogitsProcessor(base, alpha=1.5, attention_mask=batch["attention_mask"])
    got = generate(aligned, batch, processor, eos_token_id=end)
    assert got[0] == expected[0]
    assert got[1] == expected[1][:length] + [PAD] * (NEW_TOKENS - length)


def test_the_base_model_reads_the_prompt_once_and_then_one_token_a_step(llamas):
    aligned, base = llamas
    widths = []
    handle = base.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        batch = left_padded(PROMPTS[:1])
        generate(aligned, batch, ContrastiveLogitsProcessor(base, alpha=1.0))
    finally:
        handle.remove()
    assert widths == [len(PROMPTS[0])] + [1] * (NEW_TOKENS - 1)


def test_alpha_0_leaves_scores_untouched_and_never_runs_the_base_model(llamas):
    base = llamas[1]
    calls = []
    handle = base.register_forward_pre_hook(lambda module, args: calls.append(args))
    try:
        scores = torch.randn(2, 37)
        processor = ContrastiveLogitsProcessor(base, alpha=0.0)
        assert processor(torch.tensor([[5, 6], [7, 8]]), scores) is scores
    finally:
        handle.remove()
    assert calls == []


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_bad_alpha_is_refused(llamas, alpha):
    with pytest.raises(ValueError, match="alpha"):
        ContrastiveLogitsProcessor(llamas[1], alpha=alpha)


def test_alpha_of_the_wrong_type_is_refused(llamas):
    with pytest.raises(TypeError, match="alpha"):
        ContrastiveLogitsProcessor(llamas[1], alpha="2")


def test_unknown_space_is_refused(llamas):
    with pytest.raises(ValueError, match="space"):
        ContrastiveLogitsProcessor(llamas[1], alpha=1.0, space="probs")


def test_a_base_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"base\.eval\(\)"):
        ContrastiveLogitsProcessor(make_model("llama", 1).train(), alpha=1.0)


def test_beams_are_refused(llamas):
    aligned, base = llamas
    with pytest.raises(ValueError, match="log-probabilities, not raw logits"):
        generate(aligned, left_padded(PROMPTS[:1]), ContrastiveLogitsProcessor(base, alpha=1.0), num_beams=2)


def test_beams_are_refused_where_probabilities_are_differenced_too(llamas):
    aligned, base = llamas
    batch = left_padded(PROMPTS)
    processor = ContrastiveLogitsProcessor(base, alpha=1.0, space="logprobs", attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match="log-probabilities, not raw logits"):
        generate(aligned, batch, processor, num_beams=2)


def test_a_used_processor_is_refused(llamas):
    aligned, base = llamas
    processor = ContrastiveLogitsProcessor(base, alpha=1.0)
    generate(aligned, left_padded(PROMPTS[:1]), processor)
    with pytest.raises(ValueError, match="fresh ContrastiveLogitsProcessor"):
        generate(aligned, left_padded(PROMPTS[:1]), processor)


@pytest.mark.parametrize(
    "second",
    [[[5, 6, 1, 1], [7, 8, 1, 1]], [[5, 6, 1], [7, 9, 1]], [[5, 6], [7, 8]]],
    ids=["two columns", "another row", "same ids"],
)
def test_ids_that_do_not_continue_the_last_call_are_refused(llamas, second):
    processor = ContrastiveLogitsProcessor(llamas[1], alpha=1.0)
    processor(torch.tensor([[5, 6], [7, 8]]), torch.randn(2, 37))
    with pytest.raises(ValueError, match="one new token"):
        processor(torch.tensor(second), torch.randn(len(second), 37))


@pytest.mark.parametrize("order", [[2, 0, 1], [0, 0, 1, 2, 2], [1]], ids=["reordered", "regrown", "dropped"])
def test_the_cache_follows_rows_that_move(pair, order):
    aligned, base = pair
    batch = left_padded(PROMPTS)
    processor = ContrastiveLogitsProcessor(base, alpha=1.5, attention_mask=batch["attention_mask"])
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    rows = list(range(len(PROMPTS)))
    for step in range(NEW_TOKENS):
        if step in (3, 7) and len(rows) > 1:
            chosen = order if step == 3 else list(range(len(rows)))[::-1]
            ids_BT, mask_BT, rows = ids_BT[chosen], mask_BT[chosen], [rows[i] for i in chosen]
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        scores_BV = aligned(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT).logits[:, -1]
        next_B1 = processor(ids_BT, scores_BV).argmax(-1, keepdim=True)
        ids_BT, mask_BT = torch.cat([ids_BT, next_B1], dim=1), torch.cat([mask_BT, torch.ones_like(next_B1)], dim=1)
    expected = [greedy_of_unchanged(aligned, base, prompt, new_tokens=NEW_TOKENS, alpha=1.5) for prompt in PROMPTS]
    assert ids_BT[:, -NEW_TOKENS:].tolist() == [expected[row] for row in rows]


def test_several_answers_to_a_prompt_need_only_the_mask_of_the_prompts(llamas):
    aligned, base = llamas
    batch = left_padded(PROMPTS)
    processor = ContrastiveLogitsProcessor(base, alpha=1.5, attention_mask=batch["attention_mask"])
    got = generate(aligned, batch, processor, do_sample=True, top_k=1, num_return_sequences=2)
    expected = [greedy_of_unchanged(aligned, base, prompt, new_tokens=NEW_TOKENS, alpha=1.5) for prompt in PROMPTS]
    assert got == [ids for ids in expected for _ in range(2)]


def test_another_vocabulary_is_refused(llamas):
    aligned = llamas[0]
    processor = ContrastiveLogitsProcessor(make_model("llama", 1, vocab_size=41), alpha=1.0)
    with pytest.raises(ValueError, match="37 tokens and the base model 41"):
        generate(aligned, left_padded(PROMPTS[:1]), processor)


def test_a_forgotten_attention_mask_is_refused(llamas):
    aligned, base = llamas
    with pytest.raises(ValueError, match="2 of 3 rows start with the pad token"):
        generate(aligned, left_padded(PROMPTS), ContrastiveLogitsProcessor(base, alpha=1.0))


def test_the_mask_of_another_batch_is_refused(llamas):
    aligned, base = llamas
    mask = left_padded(PROMPTS[:2])["attention_mask"]
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(3, 7\)"):
        generate(aligned, left_padded(PROMPTS), ContrastiveLogitsProcessor(base, alpha=1.0, attention_mask=mask))


def test_right_padding_is_refused(llamas):
    processor = ContrastiveLogitsProcessor(llamas[1], alpha=1.0, attention_mask=torch.tensor([[1, 1], [1, 0]]))
    with pytest.raises(ValueError, match="left"):
        processor(torch.tensor([[5, 6], [7, PAD]]), torch.randn(2, 37))


def test_scores_with_banned_tokens_are_refused(llamas):
    aligned, base = llamas
    processor = ContrastiveLogitsProcessor(base, alpha=1.0)
    with pytest.raises(ValueError, match="raw logits"):
        generate(aligned, left_padded(PROMPTS[:1]), processor, min_new_tokens=2, eos_token_id=3)


def test_sampling_options_of_generate_come_after_eq_7(llamas):
    aligned, base = llamas
    expected = greedy_of_unchanged(aligned, base, PROMPTS[0], new_tokens=NEW_TOKENS, alpha=1.5)
    processor = ContrastiveLogitsProcessor(base, alpha=1.5)
    batch = left_padded(PROMPTS[:1])
    got = generate(aligned, batch, processor, do_sample=True, top_k=1, temperature=0.7)
    assert got == [expected]

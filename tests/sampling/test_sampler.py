"""What is drawn: the tokens of a slow float64 computation, whatever the padding, the batch and the caches."""

import math

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from deepalign.kernels.contrastive_sample import contrastive_logits
from deepalign.sampling import ContrastiveSampler
from deepalign.sampling.generation import row_uniforms
from tests.sampling.pairs import FAMILIES, PAD, PROMPTS, left_padded, make_model, make_pair
from tests.sampling.stepwise import eq7, greedy_of_unchanged

NEW_TOKENS = 12


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_pair(request.param)


@pytest.fixture(scope="module")
def llamas() -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_pair("llama")


def token_ids(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("space", ["logits", "logprobs"])
def test_greedy_ids_equal_float64_without_caches(pair, space):
    aligned, base = pair
    sampler = ContrastiveSampler(aligned, base, alpha=1.5, temperature=0, space=space)
    expected = [
        greedy_of_unchanged(aligned, base, prompt, new_tokens=NEW_TOKENS, alpha=1.5, space=space) for prompt in PROMPTS
    ]
    answers = sampler.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    assert token_ids(answers) == expected
    assert [answer.prompt_tokens for answer in answers] == [len(prompt) for prompt in PROMPTS]
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert {logprob for answer in answers for logprob in answer.logprobs} == {0.0}
    plain = [greedy_of_unchanged(aligned, None, prompt, new_tokens=NEW_TOKENS) for prompt in PROMPTS]
    assert expected != plain  # or Eq. 7 would not be seen


def test_prompts_have_the_names_that_tokenizers_and_chats_give_them(llamas):
    sampler = ContrastiveSampler(*llamas, alpha=1.0, temperature=0.0)
    batch = left_padded(PROMPTS)
    named = sampler.generate(**batch, max_new_tokens=3)
    assert [answer.token_ids for answer in named] == [
        answer.token_ids for answer in sampler.generate(PROMPTS, max_new_tokens=3)
    ]
    streamed = [token for token in sampler.stream(**batch, max_new_tokens=3) if token.row == 1]
    assert [token.token_id for token in streamed] == named[1].token_ids
    with pytest.raises(ValueError, match="messages were given but the sampler has no tokenizer"):
        sampler.generate(messages=[{"role": "user", "content": "x"}])
    for names in ({}, {"input_ids": [1], "messages": []}):
        with pytest.raises(TypeError, match=f"given by {len(names)} names"):
            sampler.generate(**names)


def test_padding_may_stand_on_either_side(llamas):
    sampler = ContrastiveSampler(*llamas, alpha=1.5)
    lists = sampler.generate(PROMPTS, max_new_tokens=NEW_TOKENS, seed=3)
    left = left_padded(PROMPTS)
    assert sampler.generate(left["input_ids"], left["attention_mask"], max_new_tokens=NEW_TOKENS, seed=3) == lists
    width = max(map(len, PROMPTS))
    right_ids = torch.tensor([p + [PAD] * (width - len(p)) for p in PROMPTS])
    right_mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in PROMPTS])
    assert sampler.generate(right_ids, right_mask, max_new_tokens=NEW_TOKENS, seed=3) == lists


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_row_does_not_depend_on_its_batch(pair, options):
    sampler = ContrastiveSampler(*pair, alpha=1.5, **options)
    seeds = [11, 12, 13]
    together = sampler.generate(PROMPTS, max_new_tokens=NEW_TOKENS, seed=seeds)
    for prompt, seed, answer in zip(PROMPTS, seeds, together, strict=True):
        alone = sampler.generate(prompt, max_new_tokens=NEW_TOKENS + 5, seed=seed)[0]
        assert alone.token_ids[:NEW_TOKENS] == answer.token_ids
        torch.testing.assert_close(alone.logprobs[:NEW_TOKENS], answer.logprobs, rtol=1e-4, atol=1e-5)
    reordered = sampler.generate(PROMPTS[::-1], max_new_tokens=NEW_TOKENS, seed=seeds[::-1])
    assert token_ids(reordered) == token_ids(together)[::-1]


def test_an_int_seeds_each_row_with_the_next_number(llamas):
    sampler = ContrastiveSampler(*llamas, alpha=1.5)
    by_int = sampler.generate([PROMPTS[0]] * 3, max_new_tokens=NEW_TOKENS, seed=5)
    assert by_int == sampler.generate([PROMPTS[0]] * 3, max_new_tokens=NEW_TOKENS, seed=[5, 6, 7])
    assert len(set(map(tuple, token_ids(by_int)))) == 3
    assert by_int != sampler.generate([PROMPTS[0]] * 3, max_new_tokens=NEW_TOKENS, seed=8)


def test_uniforms_of_a_step_do_not_depend_on_how_many_there_are():
    long_TB = row_uniforms([1, 2], 100)
    for steps in (1, 15, 16, 17, 64):
        assert torch.equal(row_uniforms([1, 2], steps), long_TB[:steps])
    assert bool(((long_TB >= 0) & (long_TB < 1)).all())
    assert not torch.equal(long_TB[:, 0], long_TB[:, 1])


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_tokens_follow_the_contrastive_distribution(llamas, alpha):
    """Chi-square over the first and the second token of 2000 seeds; the second given the most frequent first."""
    aligned, base = llamas
    prompt, draws = PROMPTS[1], 2000
    sampler = ContrastiveSampler(aligned, base, alpha=alpha, temperature=0.9, top_k=12)
    drawn = token_ids(sampler.generate([prompt] * draws, max_new_tokens=2, seed=1000))
    firsts = [first for first, _ in drawn]
    common = max(set(firsts), key=firsts.count)
    seconds = [second for first, second in drawn if first == common]
    for context, tokens in ((prompt, firsts), ([*prompt, common], seconds)):
        ids = torch.tensor([context])
        with torch.no_grad():
            x_V = eq7(aligned(ids).logits[0, -1].double(), base(ids).logits[0, -1].double(), alpha, "logits")
        kept = x_V.topk(12).indices
        p_K = (x_V[kept] / 0.9).softmax(-1)
        assert set(tokens) <= set(kept.tolist())
        counts_K = torch.tensor([tokens.count(id_) for id_ in kept.tolist()]).double()
        expected_K = p_K * len(tokens)
        chi_square = float(((counts_K - expected_K).square() / expected_K).sum())
        assert chi_square < 31.3, (chi_square, counts_K, expected_K)  # 11 degrees of freedom: p = 0.001


def test_alpha_0_is_the_aligned_model_alone_and_never_runs_the_base(llamas):
    aligned, base = llamas
    calls = []
    handle = base.register_forward_pre_hook(lambda module, args: calls.append(args))
    try:
        with_base = ContrastiveSampler(aligned, base, alpha=0.0).generate(PROMPTS, max_new_tokens=NEW_TOKENS, seed=2)
    finally:
        handle.remove()
    assert calls == []
    assert with_base == ContrastiveSampler(aligned, alpha=0).generate(PROMPTS, max_new_tokens=NEW_TOKENS, seed=2)
    # The same uniforms through a distribution built by hand.
    uniforms_TB = row_uniforms([2], NEW_TOKENS)
    ids = list(PROMPTS[0])
    for step in range(NEW_TOKENS):
        with torch.no_grad():
            p_V = aligned(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        ids.append(int((p_V.cumsum(-1) > uniforms_TB[step, 0]).int().argmax()))
    assert with_base[0].token_ids == ids[len(PROMPTS[0]) :]


def test_one_draw_a_step_on_the_last_position_and_no_copy_of_logits(llamas, monkeypatch):
    from deepalign.kernels.contrastive_sample import contrastive_sample
    from deepalign.sampling import generation

    aligned, base = llamas
    logits, drawn_from = [], []
    handles = [m.register_forward_hook(lambda module, args, output: logits.append(output.logits)) for m in llamas]

    def spy(aligned_logits, base_logits, **options):
        drawn_from.append((aligned_logits, base_logits))
        return contrastive_sample(aligned_logits, base_logits, **options)

    monkeypatch.setattr(generation, "contrastive_sample", spy)
    try:
        ContrastiveSampler(aligned, base, alpha=1.0).generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    finally:
        for handle in handles:
            handle.remove()
    assert len(drawn_from) == NEW_TOKENS
    assert len(logits) == 2 * NEW_TOKENS
    assert {tuple(tensor.shape) for tensor in logits} == {(3, 1, 37)}
    pointers = [tensor.data_ptr() for tensor in logits]
    assert [tensor.data_ptr() for both in drawn_from for tensor in both] == pointers


def test_finished_rows_leave_and_the_others_do_not_notice(pair):
    aligned, base = pair
    expected = [greedy_of_unchanged(aligned, base, prompt, new_tokens=NEW_TOKENS, alpha=1.5) for prompt in PROMPTS]
    first = [ids[2] for ids in expected]
    stops = [first[1], first[2]] if first[1] not in expected[0] and first[2] not in expected[0] else [first[1]]
    sizes = []
    handle = aligned.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    try:
        sampler = ContrastiveSampler(aligned, base, alpha=1.5, temperature=0)
        answers = sampler.generate(PROMPTS, max_new_tokens=NEW_TOKENS, stop=stops)
    finally:
        handle.remove()
    for answer, ids in zip(answers, expected, strict=True):
        ending = next((place for place, id_ in enumerate(ids) if id_ in stops), None)
        assert answer.token_ids == (ids if ending is None else ids[: ending + 1])
        assert answer.finish_reason == ("length" if ending is None else "stop")
    if len(stops) == 2:
        assert sizes[-1] < sizes[0]
    assert sizes[0] == 3


def test_any_rows_may_leave_and_the_rest_draw_as_if_alone(pair):
    sampler = ContrastiveSampler(*pair, alpha=1.5)
    prompts, seeds = [PROMPTS[i % 3][i // 3 :] for i in range(6)], [31, 5, 8, 13, 2, 40]
    options = {"max_new_tokens": 3 * NEW_TOKENS, "stop": [7, 9, 21]}
    together = sampler.generate(prompts, seed=seeds, **options)
    alone = [sampler.generate(prompt, seed=seed, **options)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert token_ids(together) == token_ids(alone)
    lengths = [len(ids) for ids in token_ids(together)]
    stayed = sorted(range(6), key=lengths.__getitem__)[3:]  # after the first move to a smaller batch
    assert stayed != [0, 1, 2], "the rows that stay are not those at the front"


def test_rows_that_draw_too_many_between_two_looks_lose_them(llamas):
    """What a GPU does: it looks at what was drawn every few steps only."""
    sampler = ContrastiveSampler(*llamas, alpha=1.5)
    every_step = sampler.generate(PROMPTS, max_new_tokens=NEW_TOKENS, stop=[7, 9, 21], seed=4)
    assert {answer.finish_reason for answer in every_step} == {"stop", "length"}
    for settle_every in (5, 8, 100):
        sampler.settle_every = settle_every
        answers = sampler.generate(PROMPTS, max_new_tokens=NEW_TOKENS, stop=[7, 9, 21], seed=4)
        assert token_ids(answers) == token_ids(every_step)
        assert [a.finish_reason for a in answers] == [a.finish_reason for a in every_step]


def test_statistics_say_what_the_penalty_did(llamas):
    aligned, base = llamas
    sampler = ContrastiveSampler(aligned, base, alpha=0.3, space="logprobs")
    plain = sampler.generate(PROMPTS, max_new_tokens=NEW_TOKENS, seed=9)
    answers = sampler.generate(PROMPTS, max_new_tokens=NEW_TOKENS, seed=9, return_stats=True)
    assert token_ids(answers) == token_ids(plain)
    assert all(answer.statistics is None for answer in plain)
    favored = 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        for step, id_ in enumerate(answer.token_ids):
            ids = torch.tensor([prompt + answer.token_ids[:step]])
            with torch.no_grad():
                a_V, b_V = (model(ids).logits[0, -1].double() for model in (aligned, base))
            x_V = eq7(a_V, b_V, 0.3, "logprobs")
            lowered_V = b_V.log_softmax(-1) > a_V.log_softmax(-1)
            p_a_V, p_x_V = a_V.softmax(-1), x_V.softmax(-1)
            found = answer.statistics
            assert found.base_favored[step] == bool(lowered_V[id_])
            distance = (p_a_V - p_x_V).abs().sum() / 2
            expected = [float(a_V[id_] - x_V[id_]), float(p_a_V[lowered_V].sum()), float(distance)]
            got = [found.penalty[step], found.favored_mass[step], found.mass_taken[step]]
            assert got == pytest.approx(expected, abs=2e-5)
            assert answer.logprobs[step] == pytest.approx(math.log(float(p_x_V[id_])), abs=2e-5)
            favored += found.base_favored[step]
    assert favored > 0


def test_statistics_of_alpha_0_are_zero(llamas):
    statistics = ContrastiveSampler(llamas[0], alpha=0).generate(PROMPTS[0], max_new_tokens=3, return_stats=True)[0]
    assert statistics.statistics.base_favored == [False] * 3
    assert statistics.statistics.mass_taken == pytest.approx([0.0] * 3, abs=1e-6)


def test_models_with_a_sliding_window_keep_their_own_cache():
    def mistral(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = MistralConfig(
            vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, sliding_window=5, initializer_range=0.3,
            pad_token_id=PAD, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return MistralForCausalLM(config).eval()

    aligned, base = mistral(0), mistral(1)
    sampler = ContrastiveSampler(aligned, base, alpha=1.0, temperature=0)
    expected = [greedy_of_unchanged(aligned, base, prompt, new_tokens=NEW_TOKENS, alpha=1.0) for prompt in PROMPTS]
    assert token_ids(sampler.generate(PROMPTS, max_new_tokens=NEW_TOKENS)) == expected


def test_entries_beyond_the_vocabulary_are_never_drawn():
    aligned, base = make_model("llama", 0), make_model("llama", 1, vocab_size=41)
    sampler = ContrastiveSampler(aligned, base, alpha=1.0, vocab_size=20)
    answers = sampler.generate([PROMPTS[0]] * 20, max_new_tokens=NEW_TOKENS)
    drawn = {id_ for ids in token_ids(answers) for id_ in ids}
    assert max(drawn) < 20
    assert len(drawn) > 10
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        both = [model(ids).logits[:, -1, :20] for model in (aligned, base)]
    x_V = contrastive_logits(*both, alpha=1.0)[0]
    assert answers[0].logprobs[0] == pytest.approx(float(x_V.log_softmax(-1)[answers[0].token_ids[0]]), abs=1e-5)

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from deepalign.data.chat import prompt_token_ids
from deepalign.evaluate.generation import Contrast
from deepalign.evaluate.outcomes import AttackExample, Outcome
from deepalign.evaluate.prefill import prefill_attack
from deepalign.sampling import ContrastiveLogitsProcessor
from tests.sampling.stepwise import stepwise_greedy
from tests.tiny import make_model, make_tokenizer

NEW_TOKENS = 6
EXAMPLES = [
    AttackExample("w1 w2", "w10 w11 w12 w13"),
    AttackExample("w3", "w20 w21"),
    AttackExample("w4 w5 w6 w7 w8", "w30 w31 w32 w33 w34"),
]


class Spy(LogitsProcessor):
    """Keeps the ids that generate starts from; leaves the scores alone."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask
        self.first_ids: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.first_ids is None:
            self.first_ids = input_ids.clone()
        return scores

    def unpadded(self) -> list[list[int]]:
        assert self.first_ids is not None
        return [row[mask.bool()].tolist() for row, mask in zip(self.first_ids, self.mask, strict=True)]


def spy_factory(spies: list[Spy]) -> Callable[[torch.Tensor], LogitsProcessorList]:
    def build(mask: torch.Tensor) -> LogitsProcessorList:
        spies.append(Spy(mask))
        return LogitsProcessorList([spies[-1]])

    return build


def refuse_all(example: AttackExample, prefix: str, continuation: str) -> Outcome:
    return "refused"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_model(3, tokenizer).eval()


def attack(model, tokenizer, **options):
    options = {"depth": 2, "judge": refuse_all, "max_new_tokens": NEW_TOKENS, "progress": False, **options}
    return prefill_attack(model, tokenizer, options.pop("examples", EXAMPLES), **options)


def expected_text(tokenizer, ids: list[int]) -> str:
    cut = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:cut], skip_special_tokens=True)


@pytest.mark.parametrize("depth", [0, 1, 3, 4, None])
def test_the_first_ids_of_the_target_are_forced(model, tokenizer, depth):
    spies: list[Spy] = []
    result = attack(model, tokenizer, depth=depth, logits_processor=spy_factory(spies))
    expected = []
    for example in EXAMPLES:
        target = tokenizer(example.target, add_special_tokens=False)["input_ids"]
        expected.append(prompt_token_ids(tokenizer, example.prompt) + target[:depth])
    assert sorted(spies[0].unpadded()) == sorted(expected)
    words = [" ".join(example.target.split()[:depth]) for example in EXAMPLES]
    assert [record["prefix"] for record in result.records] == words
    assert result.short_targets == (1 if depth in (3, 4) else 0)
    assert result.depth == depth


def test_ids_are_joined_and_never_encoded_again():
    """Here "a" before "b" would merge into one token if the text were encoded as a whole."""
    vocab = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "c": 5}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", chat_template=template
    )
    assert tokenizer("cab")["input_ids"] == [5, 4]
    spies: list[Spy] = []
    model = make_model(0, tokenizer).eval()
    attack(model, tokenizer, examples=[AttackExample("c", "bc")], depth=1, logits_processor=spy_factory(spies))
    assert spies[0].unpadded() == [[5, 2, 3]]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_answers_are_greedy_and_in_order_whatever_the_batch(model, tokenizer, batch_size):
    result = attack(model, tokenizer, batch_size=batch_size)
    for example, record in zip(EXAMPLES, result.records, strict=True):
        target = tokenizer(example.target, add_special_tokens=False)["input_ids"]
        prompt = prompt_token_ids(tokenizer, example.prompt) + target[:2]
        new_ids = stepwise_greedy(model, None, prompt, new_tokens=NEW_TOKENS)
        assert record["prompt"] == example.prompt
        assert record["continuation"] == expected_text(tokenizer, new_ids)
    assert len({record["continuation"] for record in result.records}) == 3


def test_padding_with_the_end_of_turn_token_is_not_read(model, tokenizer):
    padded_with_end = make_tokenizer()
    padded_with_end.pad_token = padded_with_end.eos_token
    assert attack(model, padded_with_end).records == attack(model, tokenizer).records


def test_settings_shipped_with_the_checkpoint_do_not_bend_greedy_decoding(model, tokenizer):
    plain = attack(model, tokenizer)
    model.generation_config.update(
        repetition_penalty=9.0, no_repeat_ngram_size=1, do_sample=True, temperature=2.0, num_beams=3
    )
    assert attack(model, tokenizer).records == plain.records


def test_an_answer_ends_at_any_end_id_of_the_checkpoint(model, tokenizer):
    plain = attack(model, tokenizer).records[0]["continuation"].split()
    end = tokenizer.convert_tokens_to_ids(plain[2])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    assert attack(model, tokenizer).records[0]["continuation"].split() == plain[: plain.index(plain[2])]


@pytest.mark.parametrize("through", ["contrast", "logits_processor"])
def test_contrastive_decoding_as_a_defence(model, tokenizer, through):
    base = make_model(3, tokenizer).eval()
    with torch.no_grad():
        base.lm_head.weight.mul_(1.5)

    def processors(mask: torch.Tensor) -> LogitsProcessorList:  # a processor serves one batch
        return LogitsProcessorList([ContrastiveLogitsProcessor(base, alpha=1.5, attention_mask=mask)])

    defence = {"contrast": Contrast(base, 1.5)} if through == "contrast" else {"logits_processor": processors}
    result = attack(model, tokenizer, batch_size=2, **defence)
    for example, record in zip(EXAMPLES, result.records, strict=True):
        target = tokenizer(example.target, add_special_tokens=False)["input_ids"]
        prompt = prompt_token_ids(tokenizer, example.prompt) + target[:2]
        new_ids = stepwise_greedy(model, base, prompt, new_tokens=NEW_TOKENS, alpha=1.5)
        assert record["continuation"] == expected_text(tokenizer, new_ids)
    assert result.records != attack(model, tokenizer).records


def test_two_defences_at_once_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="both given"):
        attack(model, tokenizer, contrast=Contrast(model, 1.0), logits_processor=spy_factory([]))


def test_outcomes_are_the_judges_and_are_counted(model, tokenizer):
    verdicts: dict[str, Outcome] = {"w1 w2": "harmful", "w3": "degenerate", "w4 w5 w6 w7 w8": "harmful"}
    seen = []

    def judge(example: AttackExample, prefix: str, continuation: str) -> Outcome:
        seen.append((example, prefix, continuation))
        return verdicts[example.prompt]

    result = attack(model, tokenizer, judge=judge)
    assert result.counts() == {"harmful": 2, "refused": 0, "degenerate": 1, "n": 3}
    assert [record["outcome"] for record in result.records] == ["harmful", "degenerate", "harmful"]
    pairs = list(zip(EXAMPLES, result.records, strict=True))
    assert seen[:3] == [(example, record["prefix"], record["continuation"]) for example, record in pairs]
    assert seen[3:] == [(example, "", f"{record['prefix']} {record['continuation']}") for example, record in pairs]


def test_both_scopes_are_counted(model, tokenizer):
    def judge(example: AttackExample, prefix: str, continuation: str) -> Outcome:
        return "harmful" if example.target.split()[0] in continuation.split() else "refused"

    result = attack(model, tokenizer, judge=judge)
    assert result.counts() == {"harmful": 0, "refused": 3, "degenerate": 0, "n": 3}
    assert result.with_prefix == {"harmful": 3, "refused": 0, "degenerate": 0, "n": 3}
    assert [record["outcome_with_prefix"] for record in result.records] == ["harmful"] * 3


def test_a_seed_draws_the_same_answer_in_any_batch(model, tokenizer):
    runs = [
        attack(model, tokenizer, temperature=1.0, seed=seed, batch_size=size) for seed, size in ((5, 1), (5, 3), (6, 3))
    ]
    texts = [[record["continuation"] for record in run.records] for run in runs]
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(ValueError, match="only greedy"):
        attack(model, tokenizer, temperature=1.0, logits_processor=spy_factory([]))


def test_thinking_is_set_where_the_template_has_the_switch(model, tokenizer):
    with pytest.raises(ValueError, match="has no enable_thinking"):
        attack(model, tokenizer, thinking=True)
    thinker = make_tokenizer()
    thinker.chat_template += (
        "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}w0 {% endif %}"
    )
    spies: list[Spy] = []
    with pytest.raises(ValueError, match="thinking is not set"):
        attack(model, thinker, examples=EXAMPLES[:1])
    for thinking in (True, False):
        attack(model, thinker, thinking=thinking, logits_processor=spy_factory(spies), examples=EXAMPLES[:1])
    on, off = (spy.unpadded()[0] for spy in spies)
    assert off[:-2] == [*on[:-2], thinker.convert_tokens_to_ids("w0")]
    assert off[-2:] == on[-2:]


def test_an_outcome_that_does_not_exist_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="the judge must return one of harmful, refused, degenerate; got 'unsafe'"):
        attack(model, tokenizer, judge=lambda example, prefix, continuation: "unsafe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": []}, "examples is empty"),
        ({"depth": -1}, "depth"),
        ({"examples": [AttackExample("w1", " ")]}, "has no tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_new_tokens": 60}, "context of 64"),
    ],
)
def test_bad_input_is_refused(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        attack(model, tokenizer, **options)


def test_a_model_in_training_mode_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        attack(model.train(), tokenizer)


def test_no_end_of_turn_token_is_refused(model, tokenizer):
    endless = make_tokenizer()
    endless.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id"):
        attack(model, endless)

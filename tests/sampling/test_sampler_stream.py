"""Where answers end, and how they arrive token by token."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepalign.sampling import ContrastiveSampler
from deepalign.sampling.stopping import GrowingText, stop_conditions
from tests.tiny import make_model, make_tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "w1 w2 w3"}],
    [{"role": "system", "content": "w9"}, {"role": "user", "content": "w4"}],
    [{"role": "user", "content": "w5 w6"}],
]
NEW_TOKENS = 14


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def sampler(tokenizer) -> ContrastiveSampler:
    aligned, base = (make_model(seed, tokenizer).eval() for seed in (0, 1))
    return ContrastiveSampler(aligned, base, tokenizer, alpha=0.5)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: characters beyond ASCII take several."""
    vocab = {symbol: place for place, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocab, "</s>": len(vocab)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def streamed(sampler, **options):
    events = []
    answers = sampler.generate(CONVERSATIONS, max_new_tokens=NEW_TOKENS, stream=events.append, **options)
    return answers, events


@pytest.mark.parametrize("seed", [0, 20, 40])
@pytest.mark.parametrize("stop", [None, "w7", ["w30 w", 12]], ids=str)
def test_streaming_equals_not_streaming(sampler, seed, stop):
    answers, events = streamed(sampler, seed=seed, stop=stop)
    assert answers == sampler.generate(CONVERSATIONS, max_new_tokens=NEW_TOKENS, seed=seed, stop=stop)
    iterated = list(sampler.stream(CONVERSATIONS, max_new_tokens=NEW_TOKENS, seed=seed, stop=stop))
    assert iterated == events
    for row, answer in enumerate(answers):
        own = [event for event in events if event.row == row]
        assert [event.token_id for event in own] == answer.token_ids
        assert "".join(event.text for event in own) == answer.text
        assert [event.completion for event in own] == [None] * (len(own) - 1) + [answer]


def test_tokens_arrive_before_the_next_is_drawn(sampler):
    seen = []
    for event in sampler.stream(CONVERSATIONS[0], max_new_tokens=NEW_TOKENS, seed=1):
        seen.append(event)
        if len(seen) == 3:
            break  # nobody has to take the rest
    assert [event.completion for event in seen] == [None] * 3
    assert seen[0].text != ""


def test_an_end_of_turn_token_ends_a_row_and_is_not_text(sampler, tokenizer):
    answers = sampler.generate([CONVERSATIONS[0]] * 100, max_new_tokens=NEW_TOKENS)
    ended = [answer for answer in answers if answer.finish_reason == "end"]
    assert ended
    assert len(ended) < 100
    for answer in ended:
        assert answer.token_ids.index(tokenizer.eos_token_id) == len(answer.token_ids) - 1
        assert answer.answer_ids == answer.token_ids[:-1]
    for answer in answers:
        assert answer.text == tokenizer.decode(answer.answer_ids, skip_special_tokens=True)


def test_the_checkpoints_own_end_ids_count_too(tokenizer):
    aligned, base = (make_model(seed, tokenizer).eval() for seed in (0, 1))
    aligned.generation_config.eos_token_id = [tokenizer.eos_token_id, 20]
    answers = ContrastiveSampler(aligned, base, tokenizer, alpha=0.5).generate(
        [CONVERSATIONS[0]] * 100, max_new_tokens=NEW_TOKENS
    )
    last = {answer.token_ids[-1] for answer in answers if answer.finish_reason == "end"}
    assert last == {tokenizer.eos_token_id, 20}


@pytest.mark.parametrize("kind", ["id", "ids", "string", "string inside a token"])
def test_a_row_ends_at_a_stop(sampler, tokenizer, kind):
    plain = sampler.generate(CONVERSATIONS[0], max_new_tokens=NEW_TOKENS, seed=3)[0]
    place = next(p for p in range(3, NEW_TOKENS) if plain.token_ids[p] not in plain.token_ids[:p])
    ids = plain.token_ids
    words = [tokenizer.decode([id_]) for id_ in ids]
    assert all(words[: place + 1])
    stop = {"id": ids[place], "ids": [ids[place - 1 : place + 1]], "string": f"{words[place - 1]} {words[place]}"}
    stop["string inside a token"] = f" {words[place]}"[:-1] if len(words[place]) > 2 else f" {words[place]}"
    answer = sampler.generate(CONVERSATIONS[0], max_new_tokens=NEW_TOKENS, seed=3, stop=stop[kind])[0]
    assert answer.finish_reason == "stop"
    assert len(answer.token_ids) <= place + 1
    assert answer.token_ids == ids[: len(answer.token_ids)]
    whole = tokenizer.decode(ids[: len(answer.token_ids)])
    if isinstance(stop[kind], str):
        assert answer.text == whole[: whole.index(stop[kind])]
        assert answer.stop_tokens == 0
    else:
        assert answer.stop_tokens == (2 if kind == "ids" else 1)
        assert answer.text == tokenizer.decode(answer.answer_ids)


@pytest.mark.parametrize("text", ["plain", "naïve café: 日本語 🙂!", "🙂🙂", ""], ids=ascii)
def test_text_grows_by_whole_characters(text):
    tokenizer = bytes_tokenizer()
    growing = GrowingText(tokenizer, [])
    pieces = [growing.push(id_) for id_ in tokenizer(text)["input_ids"]]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert growing.finish() == (text, "")


def test_an_unfinished_character_shows_at_the_end_only():
    tokenizer = bytes_tokenizer()
    ids = tokenizer("a🙂")["input_ids"][:-1]
    growing = GrowingText(tokenizer, [])
    assert "".join(growing.push(id_) for id_ in ids) == "a"
    whole, rest = growing.finish()
    assert whole == "a" + rest == tokenizer.decode(ids)
    assert "\ufffd" in rest


def test_what_a_stop_string_may_start_with_is_held_back():
    tokenizer = bytes_tokenizer()
    growing = GrowingText(tokenizer, ["###", "end"])
    pieces = [growing.push(id_) for id_ in tokenizer("a##b#e##")["input_ids"]]
    assert pieces == ["a", "", "", "##b", "", "#", "e", ""]  # "#e" is certain not to be "###", but "e" may be "end"
    assert growing.finish() == ("a##b#e##", "##")
    cut = GrowingText(tokenizer, ["###", "end"])
    assert "".join(cut.push(id_) for id_ in tokenizer("a##ben")["input_ids"]) == "a##b"
    assert cut.push(tokenizer("d")["input_ids"][0]) == ""
    assert cut.stopped
    assert cut.finish() == ("a##b", "")


def test_of_several_stop_strings_the_first_to_appear_cuts():
    tokenizer = bytes_tokenizer()
    growing = GrowingText(tokenizer, ["c", "bc", "abc"])
    assert "".join(growing.push(id_) for id_ in tokenizer("xabc")["input_ids"]) == "x"
    assert growing.finish() == ("x", "")


@pytest.mark.parametrize("stop", [1.5, [1.5], [["w1"]], [None], True, [True], {"w1"}], ids=str)
def test_stops_of_a_wrong_type_are_refused(sampler, stop):
    with pytest.raises(TypeError, match="stop"):
        sampler.generate(CONVERSATIONS[0], stop=stop)


@pytest.mark.parametrize("stop", ["", [""], [[]]], ids=str)
def test_empty_stops_are_refused(sampler, stop):
    with pytest.raises(ValueError, match="leave it out"):
        sampler.generate(CONVERSATIONS[0], stop=stop)


def test_stop_strings_need_a_tokenizer():
    assert stop_conditions([3, [4, 5]], [2], None).sequences == ((3,), (4, 5))
    with pytest.raises(ValueError, match="no tokenizer"):
        stop_conditions("w1", [2], None)


def test_inference_mode_does_not_leak_into_the_callers_code(sampler):
    for _ in sampler.stream(CONVERSATIONS[0], max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()

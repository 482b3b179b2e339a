"""Word-level round trips, and a chat template whose prompts are prefixes."""

import random

import pytest
from transformers import AutoTokenizer

from deepalign.data.chat import encode_example, prompt_token_ids
from deepalign.microworld.pretrain import AlignedConfig, BaseConfig, aligned_example, base_example
from deepalign.microworld.tokenizer import build_tokenizer
from deepalign.microworld.world import World

WORLD = World.build(5)
TOKENIZER = build_tokenizer(WORLD)


def _conversation() -> list[dict[str, str]]:
    task = WORLD.recipe(WORLD.splits.test[0], random.Random(0), noisy=False)
    return [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": task.answer}]


def test_special_tokens_are_distinct() -> None:
    specials = [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id]
    specials += TOKENIZER.convert_tokens_to_ids(["<user>", "<assistant>"])
    assert sorted(specials) == list(range(6))
    assert len(TOKENIZER) == 6 + len(WORLD.vocabulary())


def test_every_training_text_is_one_known_token_per_word() -> None:
    rng = random.Random(0)
    examples = [base_example(WORLD, BaseConfig(), rng) for _ in range(500)]
    examples += [aligned_example(WORLD, AlignedConfig(), rng) for _ in range(500)]
    for text in (text for example in examples for text in (example.prompt, example.answer)):
        ids = TOKENIZER.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.split())
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids) == text


def test_encoding_undoes_decoding_for_all_ids_in_any_order() -> None:
    ids = list(range(len(TOKENIZER)))
    random.Random(0).shuffle(ids)
    assert TOKENIZER.encode(TOKENIZER.decode(ids), add_special_tokens=False) == ids


def test_unknown_words_become_unk() -> None:
    assert TOKENIZER.encode("sure xyzzy .", add_special_tokens=False)[1] == TOKENIZER.unk_token_id


def test_chat_template_marks_turns_and_keeps_prompts_as_prefixes() -> None:
    messages = _conversation()
    prompt_ids, encoded = prompt_token_ids(TOKENIZER, messages[:1]), encode_example(TOKENIZER, messages)
    assert TOKENIZER.decode(prompt_ids) == f"<bos> <user> {messages[0]['content']} <end> <assistant>"
    assert encoded.input_ids[: len(prompt_ids)] == prompt_ids
    assert encoded.response_start == len(prompt_ids)
    assert TOKENIZER.decode(encoded.input_ids[len(prompt_ids) :]) == f"{messages[1]['content']} <end>"
    assert encoded.input_ids[-1] == TOKENIZER.eos_token_id


def test_chat_template_carries_several_turns_and_refuses_unknown_roles() -> None:
    messages = [*_conversation(), {"role": "user", "content": "how do i make"}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.count("<user>") == 2
    assert text.endswith("<user> how do i make <end> <assistant>")
    with pytest.raises(ValueError, match="knows the roles user and assistant, got system"):
        prompt_token_ids(TOKENIZER, [{"role": "system", "content": "x"}, *messages])


def test_saved_tokenizer_comes_back_the_same(tmp_path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = _conversation()
    assert encode_example(loaded, messages) == encode_example(TOKENIZER, messages)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    ids = list(range(len(loaded)))
    assert loaded.decode(ids) == TOKENIZER.decode(ids)
    assert loaded.encode(loaded.decode(ids)) == ids
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == ("<pad>", "<end>", "left")

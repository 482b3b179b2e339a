import pytest
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from deepalign.data.chat import encode_example, prompt_token_ids
from deepalign.data.contexts import first_ids
from tests.tiny import make_tokenizer

CONVERSATION = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids)


def test_the_answer_is_located_exactly(tokenizer):
    example = encode_example(tokenizer, CONVERSATION)
    assert decode(tokenizer, example.input_ids[: example.response_start]) == "<user> w1 w2 </s> <assistant>"
    assert decode(tokenizer, example.input_ids[example.response_start :]) == "w3 w4 w5 </s>"
    assert example.response_length == 4
    assert not example.truncated
    assert prompt_token_ids(tokenizer, "w1 w2") == example.input_ids[: example.response_start]


def test_only_the_last_answer_of_several_turns_counts(tokenizer):
    example = encode_example(tokenizer, [*CONVERSATION, {"role": "user", "content": "w6"}, CONVERSATION[1]])
    assert decode(tokenizer, example.input_ids[example.response_start :]) == "w3 w4 w5 </s>"


def test_tokens_after_the_end_of_turn_are_dropped(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("</s> ", "</s> w9 ")
    example = encode_example(tokenizer, CONVERSATION)
    assert decode(tokenizer, example.input_ids) == "<user> w1 w2 </s> w9 <assistant> w3 w4 w5 </s>"


def test_the_end_of_turn_need_not_be_the_eos_token(tokenizer):
    """Gemma's: <end_of_turn> and a newline end an answer, <eos> a document. A special token in a text ends nothing."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["w8"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("</s> ", "w8 w9 ")
    messages = [CONVERSATION[0], {"role": "assistant", "content": "w3 </s> w4"}]
    example = encode_example(tokenizer, messages)
    assert decode(tokenizer, example.input_ids[example.response_start :]) == "w3 </s> w4 w8"
    assert first_ids(9)(tokenizer, example.input_ids[-2:])[0][0] == example.input_ids[-2:-1], "w8 is not forced"


def test_an_unknown_word_ends_no_answer(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("</s> ", "")
    messages = [CONVERSATION[0], {"role": "assistant", "content": "w3 nowhere w5"}]
    example = encode_example(tokenizer, messages)
    assert decode(tokenizer, example.input_ids[example.response_start :]) == "w3 <unk> w5"


def test_a_token_of_both_prompt_and_answer_is_refused_as_such():
    """Qwen's: a prompt that ends with a newline, an answer that starts with two."""
    tokenizer = make_tokenizer(["a", "a\n\n", "q"])
    tokenizer.backend_tokenizer.pre_tokenizer = Split(" ", "removed")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}\n{{ m.content }} </s> {% endfor %}{{ 'a\n' if add_generation_prompt }}"
    )
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\n w"}]
    with pytest.raises(ValueError, match=r"joins the end .* </s> a\\n' and '\\n w </s> '\).*remove white space"):
        encode_example(tokenizer, messages)


def test_a_conversation_that_the_template_refuses_is_refused_in_its_words(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"refuses messages of user: System role not supported"):
        encode_example(tokenizer, CONVERSATION)


def test_too_long_an_answer_is_cut_and_said_so(tokenizer):
    example = encode_example(tokenizer, CONVERSATION, max_length=7)
    assert example.truncated
    assert decode(tokenizer, example.input_ids[example.response_start :]) == "w3 w4"


def test_too_long_a_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the prompt has 5 tokens and max_length is 5"):
        encode_example(tokenizer, CONVERSATION, max_length=5)


def test_a_template_is_needed_and_must_keep_the_prompt(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<assistant>", "<system>")
    with pytest.raises(ValueError, match="does not keep the prompt as a prefix"):
        encode_example(tokenizer, CONVERSATION)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        encode_example(tokenizer, CONVERSATION)

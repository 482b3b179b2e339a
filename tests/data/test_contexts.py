"""Adversarial contexts (Def. 1): ids stay ids, templates are respected."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deepalign.data.chat import prompt_token_ids
from deepalign.data.contexts import build_contexts, first_ids, fixed_prefixes, no_prefix, prefixes_of_file
from tests.tiny import TEMPLATE, make_tokenizer

TOKENIZER = make_tokenizer()
ANSWERED = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]
ASKED = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1"}]


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_the_instruction_alone():
    (context,) = build_contexts(TOKENIZER, [ANSWERED], no_prefix)
    assert context.prompt_ids == prompt_token_ids(TOKENIZER, ANSWERED[:1]) == ids("<user> w1 w2 </s> <assistant>")
    assert context.prefix_ids == []
    assert context.answer_ids == context.response_ids == ids("w3 w4 w5 </s>")


def test_every_instruction_with_every_fixed_prefix():
    contexts = build_contexts(TOKENIZER, [ANSWERED, ASKED], fixed_prefixes(["w20 w21", "w22"]))
    assert [context.row for context in contexts] == [0, 0, 1, 1]
    assert [context.prefix_ids for context in contexts] == [ids("w20 w21"), ids("w22")] * 2
    assert contexts[0].response_ids == ids("w20 w21 w3 w4 w5 </s>")
    assert contexts[2].prompt_ids == ids("<system> w9 </s> <user> w1 </s> <assistant>")
    assert contexts[2].answer_ids == []


@pytest.mark.parametrize(("count", "forced"), [(1, "w3"), (2, "w3 w4"), (9, "w3 w4 w5")])
def test_the_first_ids_of_the_answer(count, forced):
    (context,) = build_contexts(TOKENIZER, [ANSWERED], first_ids(count))
    assert context.prefix_ids == ids(forced)
    assert context.response_ids == ids("w3 w4 w5 </s>"), "the answer, cut in two; its end is never forced"


def test_ids_are_concatenated_not_texts():
    """A tokenizer that would merge across the boundary: prefix and answer keep the tokens they have alone."""
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(["<unk>", "a", "b", "ab", *"<>/user|assistant "]))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>")),
        unk_token="<unk>",
        chat_template=TEMPLATE.replace("<assistant> ", "<assistant>|").replace("> {{", ">|{{").replace(" </s> ", "|"),
    )
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ba"}]
    (context,) = build_contexts(tokenizer, [conversation], fixed_prefixes(["a"]))
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [3]
    assert context.response_ids[:2] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.txt", "\ufeffw20 w21\r\n\nw22"), ("p.jsonl", '{"prefix": "w20\u2028w21"}\n{"prefix": "w22", "id": 1}\n')],
)
def test_prefixes_of_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    contexts = build_contexts(TOKENIZER, [ANSWERED], prefixes_of_file(tmp_path / name))
    assert [context.prefix_ids for context in contexts] == [ids("w20 w21"), ids("w22")]


def test_a_line_separator_within_a_prefix_ends_no_row(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prefix": "w20\u2028w21"}\n', encoding="utf-8")
    (context,) = build_contexts(TOKENIZER, [ANSWERED], prefixes_of_file(tmp_path / "p.jsonl"))
    assert context.prefix_ids == ids("w20\u2028w21")


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no conversations"):
        build_contexts(TOKENIZER, [])
    with pytest.raises(ValueError, match="row 1: there is no answer"):
        build_contexts(TOKENIZER, [ANSWERED, ASKED], first_ids(2))
    with pytest.raises(ValueError, match="at least 1"):
        first_ids(0)
    for texts in ([], "w1"):
        with pytest.raises(ValueError, match="non-empty list"):
            fixed_prefixes(texts)
    with pytest.raises(ValueError, match="row 0: the prefix '  ' has no tokens"):
        build_contexts(TOKENIZER, [ANSWERED], fixed_prefixes(["  "]))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        prefixes_of_file(tmp_path / "nowhere.txt")
    for name, content, message in (
        ("a.jsonl", '{"prefix": "w1"}\n[1]\n', r"a\.jsonl:2: expected an object"),
        ("b.jsonl", "{\n", r"b\.jsonl:1: not valid JSON"),
        ("c.jsonl", '{"prefix": "w1\\ud800"}', r"c\.jsonl:1: the prefix holds half a surrogate pair"),
        ("c.txt", "\n", "has no prefixes"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            prefixes_of_file(tmp_path / name)

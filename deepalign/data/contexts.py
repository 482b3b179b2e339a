"""Adversarial contexts (Def. 1): an instruction and the beginning of a response that slips past the refusal.

A context (x, y_<t) is built from ids and stays ids: the chat template with its generation prompt, then the response
prefix, then what of a given answer follows. Nothing is decoded and encoded again, which would move token boundaries.

Where prefixes come from, a `PrefixSource`:

    no_prefix                      the instruction alone
    fixed_prefixes(["Sure, ..."])  each of these texts
    first_ids(5)                   the first 5 ids of the row's own answer
    prefixes_of_file(path)         one text a line, or JSONL of {"prefix": ...} (for texts of several lines)

`build_contexts` takes every instruction with every prefix of the source.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepalign.data.chat import control_ids, encode_example, prompt_token_ids, with_thinking
from deepalign.data.files import Message, check_text, read_lines, read_rows


@dataclass(frozen=True)
class Context:
    """One context as ids; the response is `prefix_ids + answer_ids`, and position t = 1 is its first token.

    `prompt_ids` end with the generation prompt; `prefix_ids` are forced (y_<t, empty for none); `answer_ids` are what a
    given answer says after them, its end-of-turn token included, empty where there is no answer. `row` is the row of
    the data.
    """

    prompt_ids: list[int]
    prefix_ids: list[int]
    answer_ids: list[int]
    row: int

    @property
    def response_ids(self) -> list[int]:
        """Prefix and answer."""
        return self.prefix_ids + self.answer_ids


# (tokenizer, ids of the row's answer) -> (prefix, what of the answer follows it), once per prefix.
PrefixSource = Callable[[PreTrainedTokenizerBase, list[int]], list[tuple[list[int], list[int]]]]


def no_prefix(tokenizer: PreTrainedTokenizerBase, answer_ids: list[int]) -> list[tuple[list[int], list[int]]]:
    """The instruction alone."""
    return [([], answer_ids)]


def fixed_prefixes(texts: Sequence[str]) -> PrefixSource:
    """Each of these texts, tokenised once on its own; a given answer follows whole.

    Raises:
        ValueError: no texts, or one without tokens (when it is used).
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"expected a non-empty list of prefixes, got {texts!r:.60}")

    def source(tokenizer: PreTrainedTokenizerBase, answer_ids: list[int]) -> list[tuple[list[int], list[int]]]:
        return [(_text_ids(tokenizer, text), answer_ids) for text in texts]

    return source


def first_ids(count: int) -> PrefixSource:
    """The first `count` ids of the row's own answer; a shorter answer gives all of itself but its end-of-turn token.

    Raises:
        ValueError: `count` is below 1; a row has no answer (when it is used).
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")

    def source(tokenizer: PreTrainedTokenizerBase, answer_ids: list[int]) -> list[tuple[list[int], list[int]]]:
        ends = bool(answer_ids) and answer_ids[-1] in control_ids(tokenizer)  # forcing it would end the response
        cut = min(count, len(answer_ids) - ends)
        if cut < 1:
            raise ValueError("there is no answer to take the first ids of; give rows with answers, or other prefixes")
        return [(answer_ids[:cut], answer_ids[cut:])]

    return source


def prefixes_of_file(path: str | os.PathLike[str]) -> PrefixSource:
    """The prefixes that a file lists: JSONL of {"prefix": text} where its name ends in .jsonl, else one text a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not UTF-8, a line of JSONL is not such an object, or the file has no prefix.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the file of prefixes {path} does not exist; give one text a line, or JSONL")
    if path.suffix == ".jsonl":
        return fixed_prefixes(read_rows(path, _prefix_of_row))
    texts = [line for line in read_lines(path) if line.strip()]
    if not texts:
        raise ValueError(f"{path} has no prefixes; give one text a line, or JSONL of {{'prefix': text}}")
    return fixed_prefixes(texts)


def build_contexts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], prefixes: PrefixSource = no_prefix
) -> list[Context]:
    """Every conversation with every prefix.

    Args:
        tokenizer: with a chat template, its thinking settled (`chat.with_thinking`).
        conversations: messages that end with the assistant's answer, or with the message to answer.
        prefixes: where response prefixes come from.

    Returns:
        Contexts in the order of the conversations; `row` is a conversation's index.

    Raises:
        ValueError: no conversations, a thinking switch left open, or what the template or the prefixes refuse (the
            message names the row).
    """
    if not conversations:
        raise ValueError("there are no conversations to build contexts of; give at least one")
    with_thinking(tokenizer, None)  # left open, the first positions would be those of an empty thought
    contexts = []
    for row, messages in enumerate(conversations):
        try:
            prompt_ids, answer_ids = _encoded(tokenizer, messages)
            pairs = prefixes(tokenizer, answer_ids)
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from None
        contexts += [Context(prompt_ids, prefix, rest, row) for prefix, rest in pairs]
    return contexts


def _encoded(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    if messages[-1]["role"] != "assistant":
        return prompt_token_ids(tokenizer, messages), []
    example = encode_example(tokenizer, messages)
    return example.input_ids[: example.response_start], example.input_ids[example.response_start :]


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = [int(id_) for id_ in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise ValueError(f"the prefix {text!r:.60} has no tokens; give a text")
    return ids


def _prefix_of_row(row: Any) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("prefix"), str) or not row["prefix"]:
        raise ValueError(f"expected an object with the key 'prefix', a non-empty text; got {row!r:.60}")
    check_text("the prefix", row["prefix"])
    return row["prefix"]

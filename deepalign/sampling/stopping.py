"""Where an answer ends: end-of-turn tokens, stop tokens, stop strings; and text that grows token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Every id that ends an answer: the tokenizer's, and those the model's generation config adds (Llama 3 has three).

    Empty if there is none.
    """
    config = getattr(model, "generation_config", None)
    configured = None if config is None else config.eos_token_id
    ids = list(configured) if isinstance(configured, list | tuple) else [configured]
    first = None if tokenizer is None else tokenizer.eos_token_id
    return [*dict.fromkeys(id_ for id_ in [first, *ids] if id_ is not None)]


@dataclass(frozen=True)
class StopConditions:
    """What ends a row besides its length."""

    end_ids: frozenset[int]
    sequences: tuple[tuple[int, ...], ...] = ()
    strings: tuple[str, ...] = ()

    def ends_with_sequence(self, ids: Sequence[int]) -> bool:
        """Whether the last ids are one of the stop sequences."""
        return any(tuple(ids[-len(sequence) :]) == sequence for sequence in self.sequences)


def stop_conditions(stop: Any, end_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> StopConditions:
    """Read the argument `stop`.

    Args:
        stop: None, a string, a token id, or a list of strings, token ids and lists of token ids.
        end_ids: ids that end every answer.
        tokenizer: needed for strings.

    Raises:
        TypeError: something else in `stop`.
        ValueError: an empty string or list, or strings without a tokenizer.
    """
    items = [] if stop is None else [stop] if isinstance(stop, str | int) else stop
    if not isinstance(items, Sequence):
        raise TypeError(f"stop is a {type(stop).__name__}; expected None, a string, a token id, or a list of these")
    strings: list[str] = []
    sequences: list[tuple[int, ...]] = []
    for item in items:
        if isinstance(item, str):
            strings.append(item)
            continue
        ids = [item] if is_token_id(item) else item
        if not isinstance(ids, Sequence) or not all(map(is_token_id, ids)):
            raise TypeError(f"stop holds {item!r:.60}; expected strings, token ids, or lists of token ids")
        sequences.append(tuple(ids))
    if "" in strings or () in sequences:
        raise ValueError("stop holds an empty string or list of ids, which every answer ends with; leave it out")
    if strings and tokenizer is None:
        raise ValueError(f"stop holds the string {strings[0]!r} but the sampler has no tokenizer; pass tokenizer=...")
    return StopConditions(frozenset(end_ids), tuple(sequences), tuple(strings))


def is_token_id(item: Any) -> bool:
    """Whether something a user passed is a token id: an int, and no bool."""
    return isinstance(item, int) and not isinstance(item, bool)


class GrowingText:
    """Text of a row as its tokens arrive, cut at the first stop string.

    Only a window of tokens is decoded again at each step: from the end of the text that was last complete, one piece
    further back, because what a token looks like may depend on the one before it. Text that may yet change is held
    back: bytes of an unfinished character, and an end that a stop string may start with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self._tokenizer, self._strings = tokenizer, strings
        self._ids: list[int] = []
        self._window, self._complete = 0, 0  # tokens decoded again, tokens whose text is complete
        self._text, self._handed_out = "", 0
        self.stopped = False

    def push(self, id_: int) -> str:
        """Add a token; returns the text that is new and certain."""
        self._ids.append(id_)
        known = self._decode(self._ids[self._window : self._complete])
        longer = self._decode(self._ids[self._window :])
        if len(longer) > len(known) and not longer.endswith(UNFINISHED):
            self._text += longer[len(known) :]
            self._window, self._complete = self._complete, len(self._ids)
            self._cut()
        return self._hand_out(len(self._text) if self.stopped else len(self._text) - self._held_back())

    def finish(self) -> tuple[str, str]:
        """The whole text, and what of it was not handed out yet."""
        if not self.stopped:
            whole = self._decode(self._ids)
            if whole.startswith(self._text[: self._handed_out]):  # nothing handed out is taken back
                self._text = whole
                self._cut()
        return self._text, self._hand_out(len(self._text))

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids)

    def _cut(self) -> None:
        """End the text before the stop string that appears first."""
        found = [place for string in self._strings if (place := self._text.find(string)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string starts with."""
        longest = max(map(len, self._strings), default=1) - 1
        return next((n for n in range(longest, 0, -1) if any(self._ends_like(s, n) for s in self._strings)), 0)

    def _ends_like(self, string: str, length: int) -> bool:
        return length < len(string) and self._text.endswith(string[:length])

    def _hand_out(self, end: int) -> str:
        piece = self._text[self._handed_out : end]
        self._handed_out = max(self._handed_out, end)
        return piece


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of an answer, without special tokens."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)  # one sequence in, one text out
    return text

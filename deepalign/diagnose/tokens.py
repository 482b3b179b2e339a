"""What kind of token an id is, and how to print it so that a reader sees it.

Tokenizers write their tokens in three ways: bytes as printable characters (GPT-2, Llama 3, Qwen: "Ġthe" for " the"),
sentencepiece's underscore ("▁the", bytes as "<0x0A>"; Llama 2, Mistral, Gemma), or whole words, possibly with "##"
before pieces. Which of them a vocabulary uses is seen in the vocabulary itself. Classes:

    special        end of turn, roles, padding and what else the tokenizer adds for itself
    whitespace     spaces, newlines and tabs only
    punctuation    punctuation and symbols only
    number         digits
    word start     Latin letters after a space, or a whole word
    word piece     Latin letters with no space before them: inside a word, or at the start of a text
    other script   letters of another script
    mixed          several of these, such as "'s" or "();"
    bytes          a part of a character
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

CLASSES = (
    "special",
    "whitespace",
    "punctuation",
    "number",
    "word start",
    "word piece",
    "other script",
    "mixed",
    "bytes",
)
FORMATTING = ("special", "whitespace", "punctuation")  # what the paper calls formatting, punctuation, special tokens
UNDERSCORE = "\u2581"  # sentencepiece's
_SIGNS = {" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONTROL = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")


class TokenDescription(NamedTuple):
    """A token id, as the tokenizer writes it, as a reader can see it, and its class."""

    id: int
    raw: str
    readable: str
    kind: str


# Raw token -> (the text it stands for, None for a part of a character; whether pieces of a word are marked as such).
Decoder = Callable[[str], tuple[str | None, bool]]


class TokenNames:
    """Describes the tokens of a tokenizer.

    Args:
        tokenizer: any of `transformers`.
        size: ids below this exist; None for the tokenizer's length. Ids that it does not know are padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> None:
        self._vocabulary = {id_: token for token, id_ in tokenizer.get_vocab().items()}
        self.size = len(tokenizer) if size is None else size
        self._added = dict(tokenizer.added_tokens_decoder)
        self._special = set(tokenizer.all_special_ids)
        self._decode = _decoder(self._vocabulary.values())

    def describe(self, id_: int) -> TokenDescription:
        """What a token is.

        Raises:
            ValueError: the id is not below `size`.
        """
        if not 0 <= id_ < self.size:
            raise ValueError(f"token id {id_} is not in [0, {self.size})")
        raw = self._vocabulary.get(id_)
        if raw is None:
            return TokenDescription(id_, f"<{id_}>", f"<{id_}>", "special")
        added = self._added.get(id_)
        if id_ in self._special or (added is not None and (added.special or _CONTROL.fullmatch(raw))):
            return TokenDescription(id_, raw, visible(raw), "special")
        text, word_start = (raw, False) if added is not None else self._decode(raw)
        if text is None:
            return TokenDescription(id_, raw, _hexadecimal(raw), "bytes")
        return TokenDescription(id_, raw, visible(text), kind_of(text, word_start=word_start))

    def class_shares(self) -> dict[str, float]:
        """How the whole vocabulary divides into classes: what a random choice of tokens would look like."""
        counts = dict.fromkeys(CLASSES, 0)
        for id_ in range(self.size):
            counts[self.describe(id_).kind] += 1
        return {kind: count / self.size for kind, count in counts.items()}


def kind_of(text: str, *, word_start: bool = False) -> str:
    """The class of a piece of text; `word_start`: it starts a word although no space is written before it."""
    core = text.strip()
    if not core:
        return "whitespace"
    categories = {unicodedata.category(character)[0] for character in core}
    if categories <= {"P", "S"}:
        return "punctuation"
    if categories <= {"N"}:
        return "number"
    if not categories <= {"L", "M"}:
        return "mixed"
    if not all(_is_latin(character) for character in core):
        return "other script"
    return "word start" if word_start or text[0].isspace() else "word piece"


def visible(text: str) -> str:
    """The text with signs for spaces and line ends, and escapes for what cannot be printed."""
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


@cache
def _is_latin(character: str) -> bool:
    return unicodedata.category(character)[0] == "M" or unicodedata.name(character, "").startswith("LATIN")


def _decoder(tokens: Iterable[str]) -> Decoder:
    vocabulary = set(tokens)
    if {"\u0120", "\u010a"} <= vocabulary:  # a byte alphabet has every byte; these are space and newline
        return _decode_bytes
    if any(token.startswith(UNDERSCORE) for token in vocabulary):
        return _decode_sentencepiece
    pieces_are_marked = any(token.startswith("##") and len(token) > 2 for token in vocabulary)
    return _decode_marked_pieces if pieces_are_marked else _decode_words


def _decode_bytes(raw: str) -> tuple[str | None, bool]:
    alphabet = _byte_alphabet()
    if not all(character in alphabet for character in raw):
        return raw, False
    return _utf8(bytes(alphabet[character] for character in raw)), False


def _decode_sentencepiece(raw: str) -> tuple[str | None, bool]:
    byte = _BYTE.fullmatch(raw)
    if byte:
        return _utf8(bytes([int(byte.group(1), 16)])), False
    return raw.replace(UNDERSCORE, " "), False


def _decode_marked_pieces(raw: str) -> tuple[str | None, bool]:
    piece = raw.startswith("##") and len(raw) > 2
    return (raw[2:] if piece else raw), not piece


def _decode_words(raw: str) -> tuple[str | None, bool]:
    return raw, True


def _utf8(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _hexadecimal(raw: str) -> str:
    if _BYTE.fullmatch(raw):
        return f"\\x{raw[3:5].lower()}"
    return "".join(f"\\x{_byte_alphabet()[character]:02x}" for character in raw)


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for every byte: itself where it prints, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}

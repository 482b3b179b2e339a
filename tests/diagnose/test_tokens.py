"""What kind of token an id is, for the three ways tokenizers write them."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepalign.diagnose.tokens import CLASSES, TokenNames, kind_of, visible
from tests.tiny import make_tokenizer

TEXTS = [
    "Hello the world, 2024!\n\nthe end; it's 日本 привет\t",
    "the the world world Hello hello 12 12",
    "日本 日本 привет привет",
]


@pytest.fixture(scope="module")
def byte_level():
    """As GPT-2, Llama 3 and Qwen write tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("wörd", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.fixture(scope="module")
def sentencepiece():
    """As Llama 2 and Gemma write tokens, with bytes for what is unknown."""
    pieces = [
        "<unk>",
        "</s>",
        "<0x0A>",
        "<0xE4>",
        "▁",
        "▁▁",
        "▁the",
        "the",
        "ing",
        ",",
        "▁(",
        "7",
        "▁42",
        "日本",
        "▁'s",
    ]
    scored = [(piece, -float(place)) for place, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize(
    ("raw", "readable", "kind"),
    [
        ("Ġthe", "␣the", "word start"),
        ("the", "the", "word piece"),
        ("Ċ", "⏎", "whitespace"),
        ("ĉ", "⇥", "whitespace"),
        ("Ġ", "␣", "whitespace"),
        (",", ",", "punctuation"),
        ("Ġ12", "␣12", "number"),
        ("æĹ¥æľ¬", "日本", "other script"),
        ("Ñ", r"\xd1", "bytes"),
        ("<|end|>", "<|end|>", "special"),
        ("<think>", "<think>", "special"),
        ("wörd", "wörd", "word piece"),
    ],
)
def test_byte_level_tokens(byte_level, raw, readable, kind):
    token = TokenNames(byte_level).describe(byte_level.get_vocab()[raw])
    assert (token.raw, token.readable, token.kind) == (raw, readable, kind)


@pytest.mark.parametrize(
    ("raw", "readable", "kind"),
    [
        ("▁the", "␣the", "word start"),
        ("the", "the", "word piece"),
        ("▁▁", "␣␣", "whitespace"),
        ("<0x0A>", "⏎", "whitespace"),
        ("<0xE4>", r"\xe4", "bytes"),
        ("▁(", "␣(", "punctuation"),
        ("7", "7", "number"),
        ("日本", "日本", "other script"),
        ("▁'s", "␣'s", "mixed"),
        ("</s>", "</s>", "special"),
    ],
)
def test_sentencepiece_tokens(sentencepiece, raw, readable, kind):
    token = TokenNames(sentencepiece).describe(sentencepiece.get_vocab()[raw])
    assert (token.raw, token.readable, token.kind) == (raw, readable, kind)


def test_words_and_marked_pieces():
    words = TokenNames(make_tokenizer(["the", ",", "12"]))
    assert [words.describe(id_).kind for id_ in (0, 6, 7, 8)] == ["special", "word start", "punctuation", "number"]
    pieces = TokenNames(make_tokenizer(["the", "##ing", "##"]))
    described = [pieces.describe(id_) for id_ in (6, 7, 8)]
    assert [token.kind for token in described] == ["word start", "word piece", "punctuation"]
    assert [token.readable for token in described] == ["the", "ing", "##"]


def test_padding_entries_are_special_and_shares_add_up(byte_level):
    names = TokenNames(byte_level, len(byte_level) + 8)
    assert names.describe(len(byte_level) + 7).kind == "special"
    shares = names.class_shares()
    assert list(shares) == list(CLASSES)
    assert sum(shares.values()) == pytest.approx(1)
    counted = sum(names.describe(id_).kind == "bytes" for id_ in range(names.size))
    assert shares["bytes"] == pytest.approx(counted / names.size)
    with pytest.raises(ValueError, match="not in"):
        names.describe(names.size)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\u00a0", "whitespace"),
        ("€", "punctuation"),
        ("½", "number"),
        ("naïve", "word piece"),
        ("e\u0301", "word piece"),
    ],
)
def test_kinds_of_text(text, kind):
    assert kind_of(text) == kind


def test_control_characters_are_shown():
    assert visible(" a\x00\u200b\r\n") == "␣a\\x00\\u200b␍⏎"

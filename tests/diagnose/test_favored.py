"""Counting base-favored tokens by position (Algorithm 1, Fig. 2)."""

import numpy as np

from deepalign.diagnose.favored import BANDS, PositionBand, count_tokens, token_report
from deepalign.diagnose.records import record_type
from deepalign.diagnose.tokens import TokenNames
from tests.tiny import make_tokenizer

BANDS_HERE = (PositionBand(1, 1), PositionBand(2, 3), PositionBand(1, None))
WORDS = ["the", ",", "a"]  # ids 6, 7, 8


def records() -> np.ndarray:
    found = np.zeros(2, dtype=record_type(3, 2))
    found["favored"] = -1
    found["length"] = [3, 1]
    found["favored"][0] = [[6, 7], [7, 8], [7, -1]]
    found["favored"][1, 0] = [7, 6]
    return found


def test_tokens_are_counted_by_band():
    names = TokenNames(make_tokenizer(WORDS))
    whole = count_tokens([records()], BANDS_HERE, names.size)
    for left, right in zip(whole, count_tokens([records()[:1], records()[1:]], BANDS_HERE, names.size), strict=True):
        assert np.array_equal(left, right)
    counts, rows = whole
    assert rows.tolist() == [2, 2, 4]
    assert counts[:, 6:9].tolist() == [[2, 2, 0], [0, 2, 1], [2, 4, 1]]
    assert counts[:, :6].sum() == 0


def test_the_report_lists_the_most_frequent_first():
    names = TokenNames(make_tokenizer(WORDS))
    first, second, everything = token_report(*count_tokens([records()], BANDS_HERE, names.size), BANDS_HERE, names, 2)
    assert [band["positions"] for band in (first, second, everything)] == ["1", "2-3", "1+"]
    assert [token["id"] for token in first["tokens"]] == [6, 7]  # a tie: the lowest id
    assert everything["tokens"][0] == {
        "id": 7,
        "token": ",",
        "readable": ",",
        "class": "punctuation",
        "count": 4,
        "share": 1.0,
    }
    assert everything["classes"]["punctuation"] == 4 / 7
    assert everything["classes"]["word start"] == 3 / 7
    assert everything["classes_of_listed"]["punctuation"] == 0.5


def test_the_bands_are_the_papers():
    assert [band.name for band in BANDS] == ["1-3", "4-15", "16+", "1+"]

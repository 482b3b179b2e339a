"""Which tokens the base model raises most over the aligned one (Algorithm 1), counted over contexts and positions.

The paper's Fig. 2 names the most frequent ones: formatting, punctuation, common words. Whether a class stands out is
seen against the whole vocabulary, most of whose entries are word pieces whatever the models do; so the report puts the
share of each class among the found tokens beside its share of the vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepalign.diagnose.tokens import CLASSES, TokenNames


@dataclass(frozen=True)
class PositionBand:
    """A range of 1-based positions, both ends included; `last` None: to the end."""

    first: int
    last: int | None

    @property
    def name(self) -> str:
        """As it is printed."""
        if self.last == self.first:
            return str(self.first)
        return f"{self.first}+" if self.last is None else f"{self.first}-{self.last}"


# The paper's early (0 to 2) and later (15 and beyond) positions, counted from 1, what lies between, and everything.
BANDS = (PositionBand(1, 3), PositionBand(4, 15), PositionBand(16, None), PositionBand(1, None))


def count_tokens(
    chunks: Iterable[np.ndarray], bands: Sequence[PositionBand], vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each token is among a row's k most base-favored ones.

    Args:
        chunks: records (`records.py`), some at a time.
        bands: position ranges, counted apart.
        vocab_size: V.

    Returns:
        (bands, V) int64 counts, and (bands,) int64 rows (a context at a position) looked at.
    """
    counts, rows = np.zeros((len(bands), vocab_size), dtype=np.int64), np.zeros(len(bands), dtype=np.int64)
    for records in chunks:
        favored, lengths = records["favored"], records["length"]
        for index, band in enumerate(bands):
            ids = favored[:, band.first - 1 : band.last]
            counts[index] += np.bincount(ids[ids >= 0], minlength=vocab_size)
            rows[index] += np.clip(lengths - (band.first - 1), 0, ids.shape[1]).sum()
    return counts, rows


def token_report(
    counts: np.ndarray, rows: np.ndarray, bands: Sequence[PositionBand], names: TokenNames, most: int = 40
) -> list[dict[str, Any]]:
    """The most frequent tokens and the classes, per band, ready for JSON.

    Args:
        counts, rows: of `count_tokens`.
        bands: the same.
        names: describes tokens.
        most: how many tokens are listed, most frequent first, ties to the lowest id.

    Returns:
        Per band: `positions`, `rows`, `tokens` (id, token, readable, class, count, share of rows) and `classes` (share
        of all found tokens, of the listed ones, by class).
    """
    report = []
    for band, counts_V, row_count in zip(bands, counts, rows, strict=True):
        order = np.lexsort((np.arange(len(counts_V)), -counts_V))[:most]
        tokens = []
        for id_ in (int(id_) for id_ in order if counts_V[id_] > 0):
            token, count = names.describe(id_), int(counts_V[id_])
            tokens.append(
                {
                    "id": id_,
                    "token": token.raw,
                    "readable": token.readable,
                    "class": token.kind,
                    "count": count,
                    "share": count / int(row_count),
                }
            )
        report.append(
            {
                "positions": band.name,
                "rows": int(row_count),
                "tokens": tokens,
                "classes": _class_shares(counts_V, names),
                "classes_of_listed": _shares([str(token["class"]) for token in tokens]),
            }
        )
    return report


def _class_shares(counts_V: np.ndarray, names: TokenNames) -> dict[str, float]:
    totals = dict.fromkeys(CLASSES, 0)
    for id_ in np.flatnonzero(counts_V):
        totals[names.describe(int(id_)).kind] += int(counts_V[id_])
    found = sum(totals.values())
    return {kind: total / found if found else 0.0 for kind, total in totals.items()}


def _shares(kinds: Sequence[str]) -> dict[str, float]:
    return {kind: kinds.count(kind) / len(kinds) if kinds else 0.0 for kind in CLASSES}

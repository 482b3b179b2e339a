"""How far judges agree: raw agreement, and what is left of it beyond chance (Cohen 1960)."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any


def cohens_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa of two lists of verdicts on the same answers.

    Returns:
        (observed - expected) / (1 - expected) agreement, at most 1; None where chance alone agrees always, because
        both gave one and the same verdict throughout: kappa is 0 / 0 then.

    Raises:
        ValueError: lists of unequal length, or empty ones.
    """
    observed = raw_agreement(first, second) / len(first)
    first_counts, second_counts = Counter(first), Counter(second)
    expected = sum(first_counts[verdict] * second_counts[verdict] for verdict in first_counts) / len(first) ** 2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def raw_agreement(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """How many verdicts are the same.

    Raises:
        ValueError: lists of unequal length, or empty ones.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"expected two lists of verdicts on the same answers, got {len(first)} and {len(second)}")
    return sum(a == b for a, b in zip(first, second, strict=True))


def agreement_rows(verdicts: Mapping[str, Sequence[Hashable]]) -> list[dict[str, Any]]:
    """Every pair of judges: `first`, `second`, `agreed`, `n` and `kappa`.

    Args:
        verdicts: judge -> its verdicts, on the same answers in the same order.
    """
    return [
        {
            "first": first,
            "second": second,
            "agreed": raw_agreement(verdicts[first], verdicts[second]),
            "n": len(verdicts[first]),
            "kappa": cohens_kappa(verdicts[first], verdicts[second]),
        }
        for first, second in combinations(verdicts, 2)
    ]

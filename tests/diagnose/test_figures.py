"""Names of tokens as a figure's font can print them, and of how many contexts curves are."""

import pytest

from deepalign.diagnose.bootstrap import Band
from deepalign.diagnose.figure_parts import LABEL_LENGTH, _sizes, token_label


@pytest.mark.parametrize(
    ("readable", "printed"),
    [
        ("␣the", "␣the"),
        ("⏎⏎", "⏎⏎"),
        ("日本", r"\u65e5\u672c"),  # not in the font
        ("привет", "привет"),
        ("$x$", r"\$x\$"),  # no mathematics
        ("a" * LABEL_LENGTH, "a" * LABEL_LENGTH),
        ("a" * (LABEL_LENGTH + 1), "a" * (LABEL_LENGTH - 1) + "…"),
    ],
)
def test_labels(readable, printed):
    assert token_label(readable) == printed


@pytest.mark.parametrize(
    ("n", "said"),
    [([9, 9, 9], "n = 9"), ([9, 4, 4], "n = 9, from position 2: 4"), ([9, 8, 4], "n = 9, from position 5: 4")],
)
def test_sizes(n, said):
    assert _sizes(Band(position=[1, 2, 5], mean=[0.0] * 3, low=[None] * 3, high=[None] * 3, n=n)) == said

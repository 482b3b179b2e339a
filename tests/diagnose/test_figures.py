"""Names of tokens as a figure's font can print them."""

import pytest

from deepalign.diagnose.figures import LABEL_LENGTH, _label


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
    assert _label(readable) == printed

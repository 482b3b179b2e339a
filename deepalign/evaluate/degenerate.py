"""When an answer is no answer: the rule of every judge that has none of its own.

A text is degenerate if

- it has no word of two letters or more: empty, only signs, only digits; or
- it goes round in circles: of its runs of four words, in a text of at least LOOP_WORDS words, fewer than LOOP_SHARE are
  different from each other.

Fluent nonsense passes this rule; only a judge that knows what is right, or a reader, tells it from an answer.
"""

import re

LOOP_WORDS = 40
LOOP_SHARE = 0.2
RUN = 4
_WORD = re.compile(r"[^\W\d_]{2,}")


def is_degenerate(text: str) -> bool:
    """Whether `text` is no answer, by the rule of the module docstring."""
    if _WORD.search(text) is None:
        return True
    words = text.split()
    if len(words) < LOOP_WORDS:
        return False
    runs = [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]
    return len(set(runs)) < LOOP_SHARE * len(runs)

"""What an attack asks, what an answer to it is, and who says so: the words every evaluation shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

Outcome = Literal["harmful", "refused", "degenerate"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
# What of an answer is judged: what the model wrote, or the forced prefix together with it.
Scope = Literal["continuation", "answer"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class AttackExample:
    """A harmful request and an answer that complies with it, whose first ids are forced."""

    prompt: str
    target: str


@dataclass(frozen=True)
class JudgedText:
    """One text to judge. `prefix` is what was forced before `continuation` and is nobody's merit or fault."""

    example: AttackExample
    prefix: str
    continuation: str


class Judge(Protocol):
    """Says what an answer is. Texts are decoded without special tokens.

    Called once per answer and scope: for the scope "continuation" with the forced prefix and what the model wrote; for
    "answer" with an empty prefix and both as one text.
    """

    def __call__(self, example: AttackExample, prefix: str, continuation: str) -> Outcome:
        """Judge `continuation`, which follows `prefix`."""
        ...


@runtime_checkable
class BatchJudge(Protocol):
    """A judge that is faster over many texts at once, such as a classifier."""

    def judge_batch(self, texts: Sequence[JudgedText]) -> list[Outcome]:
        """One outcome per text, in order."""
        ...

"""What the sampler hands back."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class TokenStatistics:
    """What Eq. 7 did at each token of a row, `statistics.py` has the definitions; one entry per token id."""

    base_favored: list[bool] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    favored_mass: list[float] = field(default_factory=list)
    mass_taken: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Completion:
    """The answer of one row.

    Attributes:
        token_ids: every id drawn, the one that ended the row included.
        logprobs: of each, natural logarithm, under the filtered and renormalised distribution it was drawn from; 0 at
            temperature 0.
        text: without special tokens, and without the stop string or stop tokens that ended it; None without a
            tokenizer.
        finish_reason: "end" (end-of-turn token), "stop" (one of `stop`) or "length".
        prompt_tokens: length of the prompt.
        stop_tokens: how many of the last ids are what ended the row: an end-of-turn token, or a stop sequence of ids.
        statistics: per token, if they were asked for.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str | None
    finish_reason: FinishReason
    prompt_tokens: int
    stop_tokens: int = 0
    statistics: TokenStatistics | None = None

    @property
    def answer_ids(self) -> list[int]:
        """`token_ids` without what ended the row."""
        return self.token_ids[: len(self.token_ids) - self.stop_tokens]


@dataclass(frozen=True)
class StreamedToken:
    """One token as it arrives.

    Attributes:
        row: of the batch.
        token_id: the id drawn.
        text: new text that is certain; it may belong to earlier tokens, and is "" where text is still held back, or
            without a tokenizer. All pieces of a row joined are its `Completion.text`.
        completion: the whole row with its last token, None before.
    """

    row: int
    token_id: int
    text: str
    completion: Completion | None = None

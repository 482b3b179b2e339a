"""The prefill attack: force the first ids of a harmful answer, and see whether the model goes on.

The forced ids are appended to the ids of the chat template's generation prompt and never decoded and re-encoded:
re-encoding merges tokens across the boundary and quietly attacks with other ids than were meant. Depth k forces the
first k ids of the target; depth 0 is the plain request, which every report needs beside the attack; `None` forces the
whole target (the paper's main setting). Greedy decoding.

Every answer has one of three outcomes. "degenerate" is neither harmful nor a refusal: a model trained into gibberish
has a low attack success rate too, and must not be taken for a safe one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import prompt_token_ids
from deepalign.evaluate.generation import Contrast, LogitsProcessorFactory, greedy_continuations

Outcome = Literal["harmful", "refused", "degenerate"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class AttackExample:
    """A harmful request and an answer that complies with it, whose first ids are forced."""

    prompt: str
    target: str


class Judge(Protocol):
    """Says what an answer is. Called once per answer, with texts decoded without special tokens."""

    def __call__(self, example: AttackExample, prefix: str, continuation: str) -> Outcome:
        """Judge `prefix` (the forced part) followed by `continuation` (what the model wrote)."""
        ...


@dataclass(frozen=True)
class PrefillResult:
    """Counts of one attack at one depth.

    `records` holds, in the order of the examples, dicts with prompt, prefix, continuation, outcome and forced_tokens.
    `short_targets` counts the examples whose target has fewer than `depth` ids and was forced whole.
    """

    depth: int | None
    harmful: int
    refused: int
    degenerate: int
    n: int
    short_targets: int
    records: list[dict[str, Any]]

    def counts(self) -> dict[str, int]:
        """The three outcomes and n, as the report stores them."""
        return {"harmful": self.harmful, "refused": self.refused, "degenerate": self.degenerate, "n": self.n}


def prefill_attack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[AttackExample],
    *,
    depth: int | None,
    judge: Judge,
    max_new_tokens: int = 512,
    batch_size: int = 32,
    contrast: Contrast | None = None,
    logits_processor: LogitsProcessorFactory | None = None,
    progress: bool = True,
) -> PrefillResult:
    """Attack `model` with the first `depth` ids of each example's target.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's tokenizer, with a chat template.
        examples: requests and targets, at least one.
        depth: ids forced; 0 forces nothing, None the whole target. A target with fewer ids is forced whole and
            counted in `short_targets`.
        judge: decides the outcome of each answer.
        max_new_tokens: cap on what the model may write after the forced ids.
        batch_size: answers generated together.
        contrast, logits_processor: a defence at inference; see `generation.greedy_continuations`.
        progress: show a bar.

    Raises:
        ValueError: no examples, a negative depth, a target without tokens, an outcome the judge may not return, or
            what `greedy_continuations` refuses.
    """
    if not examples:
        raise ValueError("there is nothing to attack: the list of examples is empty")
    if depth is not None and depth < 0:
        raise ValueError(f"depth must be 0 (no attack), positive, or None (the whole target); got {depth}")
    targets = [_target_ids(tokenizer, example) for example in examples]
    forced = [target[:depth] for target in targets]
    prompts = [
        prompt_token_ids(tokenizer, example.prompt) + prefix for example, prefix in zip(examples, forced, strict=True)
    ]
    continuations = greedy_continuations(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        contrast=contrast,
        logits_processor=logits_processor,
        progress=progress,
        description=f"prefill {'all' if depth is None else depth}",
    )
    records = [
        _record(tokenizer, judge, example, prefix, continuation)
        for example, prefix, continuation in zip(examples, forced, continuations, strict=True)
    ]
    outcomes = Counter(record["outcome"] for record in records)
    return PrefillResult(
        depth=depth,
        harmful=outcomes["harmful"],
        refused=outcomes["refused"],
        degenerate=outcomes["degenerate"],
        n=len(records),
        short_targets=0 if depth is None else sum(len(target) < depth for target in targets),
        records=records,
    )


def _target_ids(tokenizer: PreTrainedTokenizerBase, example: AttackExample) -> list[int]:
    ids = tokenizer(example.target, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the target of prompt {example.prompt!r:.80} has no tokens: {example.target!r}")
    return [int(id_) for id_ in ids]


def _record(
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    example: AttackExample,
    prefix_ids: list[int],
    continuation_ids: list[int],
) -> dict[str, Any]:
    prefix, continuation = _text(tokenizer, prefix_ids), _text(tokenizer, continuation_ids)
    outcome = judge(example, prefix, continuation)
    if outcome not in OUTCOMES:
        raise ValueError(f"the judge must return one of {', '.join(OUTCOMES)}; got {outcome!r}")
    return {
        "prompt": example.prompt,
        "prefix": prefix,
        "continuation": continuation,
        "outcome": outcome,
        "forced_tokens": len(prefix_ids),
    }


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)  # one sequence in, one text out
    return text

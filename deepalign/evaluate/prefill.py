"""The prefill attack: force the first ids of a harmful answer, and see whether the model goes on.

The forced ids are appended to the ids of the chat template's generation prompt and never decoded and re-encoded:
re-encoding merges tokens across the boundary and quietly attacks with other ids than were meant. Depth k forces the
first k ids of the target; depth 0 is the plain request, which every report needs beside the attack; `None` forces the
whole target (the paper's main setting). Greedy decoding by default.

Every answer has one of three outcomes. "degenerate" is neither harmful nor a refusal: a model trained into gibberish
has a low attack success rate too, and must not be taken for a safe one. Answers are judged twice: what the model wrote
(the scope of every headline figure), and the forced prefix together with it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.resumable import Row
from deepalign.evaluate.answers import AnswerOptions, AnyPath, Question, Verdict, answer_questions, judge_answers
from deepalign.evaluate.generation import Contrast, LogitsProcessorFactory
from deepalign.evaluate.outcomes import OUTCOMES, AttackExample, BatchJudge, Judge, Scope

WHOLE_TARGET = "all"  # how the depth None is written in files and on the command line


@dataclass(frozen=True)
class PrefillResult:
    """Counts of one attack at one depth, of what the model wrote; `with_prefix` counts prefix and continuation.

    `records` holds, in the order of the examples, the rows of `answers.py` with `outcome` and `outcome_with_prefix`.
    `short_targets` counts the examples whose target has fewer than `depth` ids and was forced whole.
    """

    depth: int | None
    harmful: int
    refused: int
    degenerate: int
    n: int
    short_targets: int
    records: list[dict[str, Any]]
    with_prefix: dict[str, int]

    def counts(self) -> dict[str, int]:
        """The three outcomes and n, as the report stores them."""
        return {"harmful": self.harmful, "refused": self.refused, "degenerate": self.degenerate, "n": self.n}


def prefill_attack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[AttackExample],
    *,
    depth: int | None,
    judge: Judge | BatchJudge,
    max_new_tokens: int = 512,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    thinking: bool | None = None,
    contrast: Contrast | None = None,
    logits_processor: LogitsProcessorFactory | None = None,
    answers_path: AnyPath | None = None,
    settings: Mapping[str, Any] | None = None,
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
        max_new_tokens, batch_size, temperature, seed, thinking: see `answers.AnswerOptions`.
        contrast, logits_processor: a defence at inference; see `generation.continuations`.
        answers_path, settings: a file that keeps the answers; see `answers.answer_questions`.
        progress: show a bar.

    Raises:
        ValueError: no examples, a negative depth, a target without tokens, an outcome the judge may not return, or
            what `answer_questions` refuses.
    """
    questions = prefill_questions(tokenizer, examples, [depth])
    rows = answer_questions(
        model,
        tokenizer,
        questions,
        AnswerOptions(max_new_tokens, batch_size, temperature, seed, thinking),
        contrast=contrast,
        logits_processor=logits_processor,
        path=answers_path,
        settings=settings,
        progress=progress,
        description="prefill",
    )
    return prefill_results(tokenizer, questions, rows, judge_answers(judge, questions, rows))[0]


def prefill_questions(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[AttackExample], depths: Sequence[int | None]
) -> list[Question]:
    """The questions of an attack at several depths.

    Raises:
        ValueError: no examples, no depth, a depth twice or negative, or a target without tokens.
    """
    if not examples:
        raise ValueError("there is nothing to attack: the list of examples is empty")
    if not depths or len(set(depths)) != len(depths):
        raise ValueError(f"expected at least one depth, and none of them twice; got {list(depths)}")
    for depth in depths:
        if depth is not None and depth < 0:
            raise ValueError(f"depth must be 0 (no attack), positive, or None (the whole target); got {depth}")
    targets = [target_ids(tokenizer, example) for example in examples]
    return [
        Question(WHOLE_TARGET if depth is None else depth, index, example, tuple(targets[index][:depth]))
        for depth in depths
        for index, example in enumerate(examples)
    ]


def prefill_results(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
) -> list[PrefillResult]:
    """One result per depth, in the order of the questions."""
    results = []
    for depth in dict.fromkeys(question.depth for question in questions):
        places = [place for place, question in enumerate(questions) if question.depth == depth]
        chosen = [verdicts[place] for place in places]
        short = 0
        if depth != WHOLE_TARGET:
            short = sum(len(target_ids(tokenizer, questions[place].example)) < int(depth) for place in places)
        records = [
            {**rows[place], "outcome": verdict.continuation, "outcome_with_prefix": verdict.answer}
            for place, verdict in zip(places, chosen, strict=True)
        ]
        results.append(
            PrefillResult(
                depth=None if depth == WHOLE_TARGET else int(depth),
                **count_outcomes(chosen, "continuation"),
                short_targets=short,
                records=records,
                with_prefix=count_outcomes(chosen, "answer"),
            )
        )
    return results


def count_outcomes(verdicts: Sequence[Verdict], scope: Scope) -> dict[str, int]:
    """The three outcomes and n."""
    counted = Counter(verdict[scope] for verdict in verdicts)
    return {**{outcome: counted[outcome] for outcome in OUTCOMES}, "n": len(verdicts)}


def depth_name(depth: int | None) -> str:
    """A depth as reports call it."""
    return WHOLE_TARGET if depth is None else str(depth)


def target_ids(tokenizer: PreTrainedTokenizerBase, example: AttackExample) -> list[int]:
    """Ids of an example's target, which the attack forces from the front.

    Raises:
        ValueError: the target has no tokens.
    """
    ids = tokenizer(example.target, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the target of prompt {example.prompt!r:.80} has no tokens: {example.target!r}")
    return [int(id_) for id_ in ids]

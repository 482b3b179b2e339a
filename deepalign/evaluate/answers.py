"""Questions with a forced beginning of the answer, answered into a file that survives a kill, and judged.

One line per answer, in the order in which batches finish:

    {"depth": 5, "index": 0, "prompt": "...", "prefix": "...", "continuation": "...", "answer": "...",
     "forced_tokens": 5, "new_tokens": 40}

`answer` is prefix and continuation decoded together: decoded apart and joined, they may lose or gain a space. A later
run answers what is missing (`data/resumable.py`). Verdicts lie in a file of their own per judge, so that a judge added
later judges the answers that are there.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import dated_prompt, prompt_token_ids, with_thinking
from deepalign.data.resumable import ResumableFile, Row, open_resumable
from deepalign.evaluate.generation import Contrast, LogitsProcessorFactory, continuations
from deepalign.evaluate.judges import judge_fingerprint, judge_texts
from deepalign.evaluate.outcomes import SCOPES, AttackExample, BatchJudge, Judge, JudgedText, Outcome, Scope
from deepalign.sampling.stopping import decode

AnyPath = str | os.PathLike[str]
JUDGED_TOGETHER = 64  # answers whose verdicts are written at once


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are generated.

    Attributes:
        max_new_tokens: cap on what the model may write after the forced ids.
        batch_size: answers generated together; it decides no answer.
        temperature: 0 is greedy.
        seed: above temperature 0, answer i draws with seed + i.
        thinking: of a chat template that has the switch (Qwen3): True or False; None where there is none.

    Raises:
        ValueError: a size below 1 or a negative temperature.
    """

    max_new_tokens: int = 512
    batch_size: int = 32
    temperature: float = 0.0
    seed: int = 0
    thinking: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")

    def fingerprint(self) -> dict[str, Any]:
        """What of it decides the answers."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}


@dataclass(frozen=True)
class Question:
    """A request and the ids of the answer that are forced; `depth` and `index` tell it from all others of a run."""

    depth: int | str
    index: int
    example: AttackExample
    forced_ids: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """What one answer is, judged without and with its forced prefix."""

    continuation: Outcome
    answer: Outcome

    def __getitem__(self, scope: Scope) -> Outcome:
        return self.answer if scope == "answer" else self.continuation


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    options: AnswerOptions,
    *,
    contrast: Contrast | None = None,
    logits_processor: LogitsProcessorFactory | None = None,
    path: AnyPath | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    description: str = "answers",
) -> list[Row]:
    """Answer every question that the file at `path` has no answer to yet.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's tokenizer, with a chat template.
        questions: at least one; answered depth by depth, in the order of their first appearance.
        options: how.
        contrast, logits_processor: a defence at inference; see `generation.continuations`.
        path: JSONL of the answers; None keeps them in memory only.
        settings: what else decides the answers, such as fingerprints of the models; kept with the file.
        progress: show a bar per depth.
        description: label of the bars.

    Returns:
        The row of each question, in their order.

    Raises:
        ValueError: the file belongs to another run, two questions are the same, thinking does not fit the template, or
            what `continuations` refuses.
    """
    places = {(question.depth, question.index): place for place, question in enumerate(questions)}
    if len(places) != len(questions):
        raise ValueError("two questions have the same depth and index; number them apart")
    fingerprint = {
        "questions": questions_fingerprint(questions),
        "options": options.fingerprint(),
        **dated_prompt(tokenizer),
        **(settings or {}),
    }
    rows: dict[int, Row] = {}
    with _file(path, fingerprint, places) as file:
        for row in [] if file is None else file.rows:
            rows[places[row["depth"], row["index"]]] = row
        for depth in dict.fromkeys(question.depth for question in questions):
            missing = [
                place for place, question in enumerate(questions) if question.depth == depth and place not in rows
            ]
            batches = _answers(
                model,
                tokenizer,
                [questions[place] for place in missing],
                options,
                contrast=contrast,
                logits_processor=logits_processor,
                progress=progress,
                description=f"{description} {depth}",
            )
            for batch in batches:
                new = {missing[i]: row for i, row in batch}
                if file is not None:
                    file.append(list(new.values()))
                rows |= new
    return [rows[place] for place in range(len(questions))]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    options: AnswerOptions,
    **how: Any,
) -> Iterator[list[tuple[int, Row]]]:
    """Batches of (place, row); `how`: what else `continuations` takes."""
    if not questions:
        return
    asked = with_thinking(tokenizer, options.thinking)
    batches = continuations(
        model,
        tokenizer,
        [prompt_token_ids(asked, question.example.prompt) + list(question.forced_ids) for question in questions],
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        temperature=options.temperature,
        seeds=[options.seed + question.index for question in questions],
        **how,
    )
    for batch in batches:
        yield [(place, _row(tokenizer, questions[place], ids)) for place, ids in batch]


def judge_answers(
    judge: Judge | BatchJudge,
    questions: Sequence[Question],
    rows: Sequence[Row],
    *,
    path: AnyPath | None = None,
    progress: bool = False,
    description: str = "judge",
) -> list[Verdict]:
    """Judge answers in both scopes, those first that the file at `path` has no verdict on yet.

    Args:
        judge: decides.
        questions, rows: as of `answer_questions`.
        path: JSONL of the verdicts; None keeps them in memory only.
        progress, description: of the bar.

    Raises:
        ValueError: the file belongs to other answers or another judge, or the judge returned no outcome.
    """
    places = {(question.depth, question.index): place for place, question in enumerate(questions)}
    answers = hashlib.sha256(json.dumps([row["continuation"] for row in rows]).encode()).hexdigest()
    settings = {
        "questions": questions_fingerprint(questions),
        "answers": answers,
        "judge": judge_fingerprint(judge) if path is not None else None,
    }
    verdicts: dict[int, Verdict] = {}
    with _file(path, settings, places) as file:
        for row in [] if file is None else file.rows:
            verdicts[places[row["depth"], row["index"]]] = Verdict(row["continuation"], row["answer"])
        missing = [place for place in range(len(rows)) if place not in verdicts]
        for start in range(0, len(missing), JUDGED_TOGETHER):
            part = missing[start : start + JUDGED_TOGETHER]
            texts = [_judged(questions[place].example, rows[place], scope) for scope in SCOPES for place in part]
            outcomes = judge_texts(judge, texts, progress=progress, description=description)
            new = dict(zip(part, map(Verdict, outcomes[: len(part)], outcomes[len(part) :]), strict=True))
            if file is not None:
                file.append(
                    [
                        {"depth": rows[place]["depth"], "index": rows[place]["index"], **asdict(verdict)}
                        for place, verdict in new.items()
                    ]
                )
            verdicts |= new
    return [verdicts[place] for place in range(len(rows))]


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """What tells one list of questions from another."""
    return hashlib.sha256(json.dumps([asdict(question) for question in questions]).encode()).hexdigest()


def _file(
    path: AnyPath | None, settings: Mapping[str, Any], places: Mapping[tuple[int | str, int], int]
) -> AbstractContextManager[ResumableFile | None]:
    if path is None:
        return nullcontext()
    seen = set()

    def check(number: int, row: Row) -> str | None:
        key = (row.get("depth"), row.get("index"))
        if key not in places:
            return f"is no answer to a question of this run (depth {key[0]}, index {key[1]})"
        if key in seen:
            return f"answers depth {key[0]}, index {key[1]} again"
        seen.add(key)
        return None

    return open_resumable(path, settings, check)


def _row(tokenizer: PreTrainedTokenizerBase, question: Question, new_ids: list[int]) -> Row:
    forced = list(question.forced_ids)
    return {
        "depth": question.depth,
        "index": question.index,
        "prompt": question.example.prompt,
        "prefix": decode(tokenizer, forced),
        "continuation": decode(tokenizer, new_ids),
        "answer": decode(tokenizer, forced + new_ids),
        "forced_tokens": len(forced),
        "new_tokens": len(new_ids),
    }


def _judged(example: AttackExample, row: Row, scope: Scope) -> JudgedText:
    if scope == "answer":
        return JudgedText(example, "", row["answer"])
    return JudgedText(example, row["prefix"], row["continuation"])

"""A prefill attack at several depths with several judges, into a folder that an interrupted run goes on with:

answers.jsonl            every answer (answers.py)
verdicts-JUDGE.jsonl     what each judge says of it, in both scopes
report.json, report.md   counts with intervals, agreement of the judges, settings, versions
attack_success.png       the three outcomes by depth, the first judge's
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepalign.data.files import write_text_atomic
from deepalign.data.resumable import Row
from deepalign.drawing import curve_styles
from deepalign.evaluate.agreement import agreement_rows
from deepalign.evaluate.answers import AnswerOptions, Question, Verdict, answer_questions, judge_answers
from deepalign.evaluate.judges import check_judges, make_judge
from deepalign.evaluate.markdown import markdown_table
from deepalign.evaluate.outcomes import OUTCOMES, SCOPES, AttackExample
from deepalign.evaluate.plots import plot_attack_success
from deepalign.evaluate.prefill import depth_name, prefill_questions, prefill_results
from deepalign.evaluate.statistics import format_rate, rounded_interval
from deepalign.evaluate.subjects import LoadedSubject, Subject, load_subject
from deepalign.versions import versions

SCOPE_LABELS = {"continuation": "what the model wrote", "answer": "forced prefix and what the model wrote"}


@dataclass(frozen=True)
class JudgedAnswers:
    """Answers of one subject and the verdicts of each judge (by specification), in the order of the questions."""

    questions: list[Question]
    rows: list[Row]
    verdicts: dict[str, list[Verdict]]


def attacked(
    loaded: LoadedSubject,
    examples: Sequence[AttackExample],
    depths: Sequence[int | None],
    judges: Sequence[str],
    options: AnswerOptions,
    folder: Path,
    *,
    progress: bool = True,
) -> JudgedAnswers:
    """Answer and judge what `folder` does not hold yet.

    Args:
        loaded: the attacked model.
        examples, depths: see `prefill.prefill_questions`.
        judges: specifications (`judges.py`), at least one, none twice.
        options: see `answers.AnswerOptions`.
        folder: of the files.
        progress: show bars.

    Raises:
        ValueError: no judge or one twice, files of another run, or what `answer_questions` refuses.
    """
    check_judges(judges)
    made = {spec: make_judge(spec) for spec in judges}  # refused before anything is generated
    questions = prefill_questions(loaded.tokenizer, examples, depths)
    rows = answer_questions(
        loaded.model,
        loaded.tokenizer,
        questions,
        options,
        contrast=loaded.contrast,
        path=folder / "answers.jsonl",
        settings=loaded.subject.fingerprint(),
        progress=progress,
        description=f"{loaded.subject.name}: prefill",
    )
    verdicts = {
        spec: judge_answers(
            judge,
            questions,
            rows,
            path=folder / f"verdicts-{file_name(spec)}.jsonl",
            progress=progress,
            description=spec,
        )
        for spec, judge in made.items()
    }
    return JudgedAnswers(questions, rows, verdicts)


def run_prefill(
    subject: Subject,
    examples: Sequence[AttackExample],
    depths: Sequence[int | None],
    judges: Sequence[str],
    options: AnswerOptions,
    folder: str | Path,
    *,
    data: str = "",
    progress: bool = True,
) -> Path:
    """Attack, judge and report; returns the path of report.md.

    Args:
        subject: loaded for the time of the attack.
        examples, depths, judges, options, progress: see `attacked`.
        folder: of the files of the module docstring.
        data: where the examples come from, for the report.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: what is wrong, before anything is generated where it can be known.
    """
    folder, started = Path(folder), time.perf_counter()
    check_judges(judges)
    with load_subject(subject) as loaded:
        judged = attacked(loaded, examples, depths, judges, options, folder, progress=progress)
        results = {
            spec: prefill_results(loaded.tokenizer, judged.questions, judged.rows, verdicts)
            for spec, verdicts in judged.verdicts.items()
        }
    report = {
        "subject": asdict(subject),
        "data": {"source": data, "n": len(examples)},
        "options": asdict(options),
        "judges": {
            spec: {
                depth_name(result.depth): {
                    scope: with_intervals(result.counts() if scope == "continuation" else result.with_prefix)
                    for scope in SCOPES
                }
                for result in by_depth
            }
            for spec, by_depth in results.items()
        },
        "short_targets": {depth_name(result.depth): result.short_targets for result in results[judges[0]]},
        "agreement": agreement(judged),
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    write_text_atomic(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _plot(report, judges[0], folder / "attack_success.png")
    write_text_atomic(folder / "report.md", _markdown(report))
    return folder / "report.md"


def agreement(judged: JudgedAnswers) -> list[dict[str, Any]]:
    """Every pair of judges, in the scope of what the model wrote."""
    return agreement_rows(
        {spec: [verdict.continuation for verdict in verdicts] for spec, verdicts in judged.verdicts.items()}
    )


def agreement_table(rows: Sequence[dict[str, Any]]) -> str:
    """Agreement of judges as Markdown."""
    cells = [
        [
            row["first"],
            row["second"],
            format_rate(row["agreed"], row["n"]),
            "undefined: one verdict throughout" if row["kappa"] is None else f"{row['kappa']:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(["judge", "and judge", "agree on", "Cohen's kappa"], cells)


def with_intervals(counts: dict[str, int]) -> dict[str, Any]:
    """Counts of the three outcomes with the 95% Wilson interval of each."""
    return {**counts, **{f"{outcome}_interval": rounded_interval(counts[outcome], counts["n"]) for outcome in OUTCOMES}}


def file_name(text: str) -> str:
    """A name or specification as a part of a file name."""
    return "".join(sign if sign.isalnum() or sign in "._" else "-" for sign in text)


def _plot(report: dict[str, Any], judge: str, path: Path) -> None:
    by_depth = {
        int(depth) if depth.isdecimal() else depth: cell["continuation"]
        for depth, cell in report["judges"][judge].items()
    }
    counts: dict[str, dict[Any, tuple[int, int]]] = {
        outcome: {depth: (cell[outcome], cell["n"]) for depth, cell in by_depth.items()} for outcome in OUTCOMES
    }
    # The colours of bars.py: harmful blue, degenerate grey. An empty name passes a colour over.
    styles = curve_styles({name: name for name in ("degenerate", "refused", "", "harmful")})
    title = f"Answers by prefill depth, 95% Wilson bands (n = {report['data']['n']})"
    plot_attack_success(path, counts, styles, title=title, ylabel=f"share of answers, by {judge}")


def _markdown(report: dict[str, Any]) -> str:
    sections = [
        f"# Prefill attack: {report['subject']['name']}\n\n{report['data']['n']} requests"
        f"{' of ' + report['data']['source'] if report['data']['source'] else ''}. Counts with 95% Wilson intervals. "
        "Depth 0 is the plain request, `all` the whole target forced."
    ]
    for judge, by_depth in report["judges"].items():
        for scope in SCOPES:
            rows = [
                [depth, *(format_rate(cell[scope][outcome], cell[scope]["n"]) for outcome in OUTCOMES)]
                for depth, cell in by_depth.items()
            ]
            sections.append(f"## {judge}: {SCOPE_LABELS[scope]}\n\n" + markdown_table(["depth", *OUTCOMES], rows))
    if report["agreement"]:
        sections.append("## Agreement of the judges\n\n" + agreement_table(report["agreement"]))
    if short := {depth: count for depth, count in report["short_targets"].items() if count}:
        sections.append(
            "Targets shorter than the depth, forced whole: "
            + ", ".join(f"{count} at depth {depth}" for depth, count in short.items())
        )
    sections.append("![outcomes by depth](attack_success.png)")
    settings = json.dumps({key: report[key] for key in ("subject", "options", "versions")}, indent=2)
    sections.append(
        f"## How it was made\n\n{report['seconds']} s for what was not there yet.\n\n```json\n{settings}\n```"
    )
    return "\n\n".join(sections) + "\n"

"""Table 5 for one model, into a folder that an interrupted run goes on with: answers.jsonl, verdicts, reasoning.jsonl
(what was decided on each answer), reasoning.json and reasoning.md."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from deepalign.data.files import write_text_atomic
from deepalign.evaluate.answers import AnswerOptions
from deepalign.evaluate.judges import check_judges
from deepalign.evaluate.markdown import markdown_table
from deepalign.evaluate.outcomes import AttackExample
from deepalign.evaluate.prefill import WHOLE_TARGET
from deepalign.evaluate.prefill_run import attacked
from deepalign.evaluate.reasoning import (
    counts_with_intervals,
    cross_tabulate,
    make_reasoning_judge,
    table_rows,
    write_records,
)
from deepalign.evaluate.subjects import Subject, load_subject
from deepalign.versions import versions


def run_reasoning(
    subject: Subject,
    examples: Sequence[AttackExample],
    depth: int | None,
    harmful_judge: str,
    reasoning_judge: str,
    options: AnswerOptions,
    folder: str | Path,
    *,
    data: str = "",
    progress: bool = True,
) -> Path:
    """Attack, judge twice, cross; returns the path of reasoning.md.

    Args:
        subject, examples, options, progress: see `prefill_run.attacked`.
        depth: tokens forced; None: the whole target.
        harmful_judge: a specification of `judges.py`.
        reasoning_judge: a specification of `reasoning.py`.
        folder: of the files of the module docstring.
        data: where the examples come from, for the report.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: what is wrong.
    """
    folder, started = Path(folder), time.perf_counter()
    check_judges([harmful_judge])
    judge = make_reasoning_judge(reasoning_judge)
    with load_subject(subject) as loaded:
        judged = attacked(loaded, examples, [depth], [harmful_judge], options, folder, progress=progress)
    result = cross_tabulate(judged.questions, judged.rows, judged.verdicts[harmful_judge], judge)
    write_records(result, folder / "reasoning.jsonl")
    report = {
        "subject": asdict(subject),
        "data": {"source": data, "n": len(examples)},
        "depth": WHOLE_TARGET if depth is None else depth,
        "judges": {"harmful": harmful_judge, "reasoning": reasoning_judge},
        "options": asdict(options),
        "counts": counts_with_intervals(result),
        "first_reasons": result.first_reasons,
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    write_text_atomic(folder / "reasoning.json", json.dumps(report, indent=2) + "\n")
    parts = [
        f"# Reasoning under attack: {subject.name}",
        markdown_table(["Response Category", subject.name], table_rows([result])),
        f"Prefill {report['depth']}, n = {len(examples)}. Harmful by {harmful_judge}, reasoning by {reasoning_judge}; "
        "counts with 95% Wilson intervals.",
    ]
    if result.first_reasons:
        parts.append(
            f"Where an answer reasons, its first reason stands at {100 * median(result.first_reasons):.0f}% of its "
            "length (median; 0: its start)."
        )
    write_text_atomic(folder / "reasoning.md", "\n\n".join(parts) + "\n")
    return folder / "reasoning.md"

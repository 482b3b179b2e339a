"""What a model is still good for, by lm-eval as a library (extra `utility`).

Tasks go by the paper's names (TASKS), by lm-eval's own, or are your own YAML files in `include_path`. TruthfulQA is
lm-eval's two multiple-choice scores, shown apart. Every score comes with lm-eval's standard error.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepalign.data.chat import with_thinking
from deepalign.data.files import write_text_atomic
from deepalign.evaluate.families import Score
from deepalign.evaluate.markdown import markdown_table
from deepalign.evaluate.subjects import LoadedSubject, Subject, load_subject
from deepalign.versions import versions

TASKS: dict[str, tuple[str, ...]] = {
    "MMLU": ("mmlu",),
    "ARC-E": ("arc_easy",),
    "ARC-C": ("arc_challenge",),
    "BoolQ": ("boolq",),
    "HellaSwag": ("hellaswag",),
    "Winogrande": ("winogrande",),
    "ToxiGen": ("toxigen",),
    "TriviaQA": ("triviaqa",),
    "TruthfulQA": ("truthfulqa_mc1", "truthfulqa_mc2"),
    "GSM8K": ("gsm8k",),
}
PAPER_NAMES = {"truthfulqa_mc1": "TruthfulQA mc1", "truthfulqa_mc2": "TruthfulQA mc2"} | {
    names[0]: paper for paper, names in TASKS.items() if len(names) == 1
}


@dataclass(frozen=True)
class UtilitySettings:
    """What is asked, and how.

    Attributes:
        tasks: the paper's names, lm-eval's, or those of local tasks.
        include_path: folder of local tasks (YAML), beside lm-eval's.
        limit: questions per task; None: all. For trials only.
        num_fewshot: examples in the prompt; None: each task's own number.
        batch_size: rows read together; it decides no score beyond rounding.
        chat_template: put the questions into the tokenizer's chat template.
        seed: of fewshot examples and of tasks that sample.

    Raises:
        ValueError: no tasks, or a number out of range.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    chat_template: bool = False
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("utility needs at least one task; name some, or leave utility out")
        for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"utility: {name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class LmEvalUtility:
    """`families.Utility` by lm-eval."""

    settings: UtilitySettings

    def fingerprint(self) -> Any:
        """What decides the scores, besides the model."""
        return {name: value for name, value in asdict(self.settings).items() if name != "batch_size"}

    def scores(self, loaded: LoadedSubject, folder: Path, progress: bool) -> list[Score]:
        """Run the tasks; see `lm_eval_scores`."""
        return lm_eval_scores(loaded, self.settings)


def check_lm_eval() -> None:
    """Refuse to begin without lm-eval.

    Raises:
        RuntimeError: it is not installed; what to do.
    """
    try:
        import lm_eval  # noqa: F401
        from lm_eval.tasks import TaskManager  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"utility is measured by lm-eval, which cannot be imported ({error}); install deepalign with its utility "
            "extra: pip install '.[utility]' in a checkout"
        ) from None


def lm_eval_scores(loaded: LoadedSubject, settings: UtilitySettings) -> list[Score]:
    """Every metric of every task, in the order of the tasks.

    Raises:
        RuntimeError: lm-eval is not installed.
        ValueError: an unknown task.
    """
    check_lm_eval()
    import lm_eval
    from lm_eval.tasks import TaskManager

    from deepalign.evaluate.lm_eval_model import ContrastiveLM

    names = [name for task in settings.tasks for name in TASKS.get(task, (task,))]
    manager = None
    if settings.include_path is not None:  # lm-eval's own tasks take seconds to index: only where one is asked for
        manager = TaskManager(include_path=settings.include_path, include_defaults=False)
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=settings.include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}; use its names, {', '.join(TASKS)}, or YAML files in "
            "include_path"
        )
    results = lm_eval.simple_evaluate(
        model=ContrastiveLM(
            loaded.model, loaded.tokenizer, loaded.contrast, batch_size=settings.batch_size, seed=settings.seed
        ),
        tasks=list(names),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        apply_chat_template=settings.chat_template,
        task_manager=manager,
        log_samples=False,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )
    assert results is not None  # None is for ranks above 0
    return [score for name in names for score in _scores(name, results)]


def run_utility(
    subject: Subject, settings: UtilitySettings, folder: str | Path, *, thinking: bool | None = None
) -> Path:
    """Measure and report; returns the path of utility.md, with utility.json beside it.

    `thinking` is that of the chat template, to be set where questions are put into one that has the switch.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: what is wrong.
    """
    check_lm_eval()
    if thinking is not None and not settings.chat_template:
        raise ValueError("--thinking is of a chat template, which the questions are not put into; add --chat-template")
    folder, started = Path(folder), time.perf_counter()
    with load_subject(subject) as loaded:
        if settings.chat_template:
            loaded = replace(loaded, tokenizer=with_thinking(loaded.tokenizer, thinking))
        scores = lm_eval_scores(loaded, settings)
    report = {
        "subject": asdict(subject),
        "settings": {**asdict(settings), "thinking": thinking},
        "scores": [asdict(score) for score in scores],
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    write_text_atomic(folder / "utility.json", json.dumps(report, indent=2) + "\n")
    table = markdown_table(["task", "metric", "score", "standard error", "n"], score_rows(scores))
    write_text_atomic(folder / "utility.md", f"# Utility: {subject.name}\n\n{table}\n\n{report['seconds']} s.\n")
    return folder / "utility.md"


def score_rows(scores: Sequence[Score]) -> list[list[str]]:
    """Cells of a table of scores."""
    return [
        [
            PAPER_NAMES.get(score.task, score.task),
            score.metric,
            f"{score.value:.4f}",
            "" if score.stderr is None else f"{score.stderr:.4f}",
            "" if score.n is None else str(score.n),
        ]
        for score in scores
    ]


def _scores(name: str, results: dict[str, Any]) -> list[Score]:
    """lm-eval writes a metric as "acc,none" and its error as "acc_stderr,none"."""
    found = results["results"].get(name) or results["groups"][name]
    n = results.get("n-samples", {}).get(name, {}).get("effective")
    scores = []
    for key, value in found.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = found.get(f"{metric}_stderr,{filter_name}")
        shown = metric if filter_name == "none" else f"{metric} ({filter_name})"
        scores.append(Score(name, shown, float(value), stderr if isinstance(stderr, float) else None, None, n))
    return scores

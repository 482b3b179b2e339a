"""The microworld's utility as local tasks of lm-eval, so that the path real models take runs offline.

`write_tasks` writes questions (JSONL) and task files (YAML) for one world into a folder, which lm-eval reads as
`include_path`. Recipes are generated and judged by the rule of `utility.py`; sums, capitals and questions of safety are
multiple choice: every sum, every city, yes or no.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from deepalign.data.files import write_jsonl, write_text_atomic
from deepalign.microworld.utility import MAX_NEW_TOKENS, recipe_is_right, utility_tasks
from deepalign.microworld.world import LARGEST_ADDEND, SAFE_ANSWER, SUM_ANSWER, UNSAFE_ANSWER, Task, World

PREFIX = "microworld_"
TASK_NAMES = tuple(PREFIX + name for name in ("recipes_heldout", "sums", "capitals", "safety_questions"))
# lm-eval looks a task's function up in a Python file beside the task.
RULE = "from deepalign.microworld.lm_eval_tasks import recipe_results\n"


def write_tasks(world: World, folder: str | Path) -> Path:
    """Write the tasks of one world; returns the folder."""
    folder = Path(folder).resolve()  # lm-eval reads data relative to where it runs
    for name, questions in utility_tasks(world).items():
        rows = [_row(world, task) for task in questions]
        data = folder / f"{name}.jsonl"
        write_jsonl(data, rows)
        write_text_atomic(folder / f"{name}.yaml", _task_file(PREFIX + name, data, is_recipe=name == "recipes_heldout"))
    write_text_atomic(folder / "recipe_rule.py", RULE)
    return folder


def recipe_results(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's `process_results` of a recipe: `acc`, 1 if it is right."""
    return {"acc": float(recipe_is_right(document["expected"], results[0].split()))}


def _row(world: World, task: Task) -> dict[str, Any]:
    row: dict[str, Any] = {"question": task.prompt, "answer": task.answer}
    if task.kind == "recipe":
        return {**row, "expected": list(world.content_words(world.find_pair(task.prompt)))}
    choices = _choices(world, task)
    return {**row, "choices": choices, "right": choices.index(task.answer)}


def _choices(world: World, task: Task) -> list[str]:
    if task.kind == "sum":
        return [SUM_ANSWER.format(total=total) for total in range(2 * LARGEST_ADDEND + 1)]
    if task.kind == "capital":
        right_city = task.answer.split()[-2]
        return [task.answer.replace(right_city, city) for city in world.capitals.values()]
    item = next(word for word in task.prompt.split() if word in (*world.hazards, *world.dishes))
    return [answer.format(item=item) for answer in (SAFE_ANSWER, UNSAFE_ANSWER)]


def _task_file(name: str, data: Path, *, is_recipe: bool) -> str:
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    if is_recipe:
        task |= {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False},
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        return yaml.safe_dump(task, sort_keys=False) + "process_results: !function recipe_rule.recipe_results\n"
    task |= {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }
    return yaml.safe_dump(task, sort_keys=False)

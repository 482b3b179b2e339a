"""Data for `deepalign diagnose` on the models of a demo: the attacked requests and benign ones, with clean answers."""

from pathlib import Path

from deepalign.data.files import write_jsonl
from deepalign.microworld.utility import utility_tasks
from deepalign.microworld.world import World, attack_examples


def diagnosis_files(world: World, out_dir: str | Path, n: int) -> tuple[Path, Path]:
    """Write `attacks.jsonl` and `recipes.jsonl`, rows {"prompt", "completion"}.

    Args:
        world: of the demo's seed.
        out_dir: folder, created where it is missing.
        n: rows: hazard pairs of the test split, with the clean compliant answers that attacks force from; and dish
            recipes of pairs that no stage trains on (fewer where the world has fewer).

    Raises:
        ValueError: `n` is not between 1 and the size of the test split.
    """
    rows = {
        "attacks": [(example.prompt, example.target) for example in attack_examples(world, n)],
        "recipes": [(task.prompt, task.answer) for task in utility_tasks(world)["recipes_heldout"][:n]],
    }
    paths = []
    for name, pairs in rows.items():
        paths.append(Path(out_dir) / f"{name}.jsonl")
        write_jsonl(paths[-1], ({"prompt": prompt, "completion": answer} for prompt, answer in pairs))
    return paths[0], paths[1]

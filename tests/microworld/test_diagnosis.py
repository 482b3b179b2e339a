"""Data for a diagnosis of the demo's models."""

from deepalign.data.files import read_jsonl
from deepalign.microworld.diagnosis import diagnosis_files
from deepalign.microworld.utility import utility_tasks
from deepalign.microworld.world import World, attack_examples


def test_the_files_are_the_attacks_and_recipes_that_are_evaluated(tmp_path):
    world = World.build(3)
    attacks, recipes = map(read_jsonl, diagnosis_files(world, tmp_path / "data", 7))
    assert [turn["content"] for turns in attacks for turn in turns] == [
        text for example in attack_examples(world, 7) for text in (example.prompt, example.target)
    ]
    assert [turns[0]["content"] for turns in recipes] == [
        task.prompt for task in utility_tasks(world)["recipes_heldout"][:7]
    ]

"""Same seed, same world; the splits hold what they promise; nothing held out reaches a training file."""

import itertools
import json
import random

import pytest

from deepalign.microworld.pretrain import AlignedConfig, BaseConfig, aligned_example, base_example
from deepalign.microworld.world import (
    BROKEN_OFF,
    MATERIAL_SLOTS,
    SENTENCES,
    SLOTS,
    Pair,
    World,
    attack_examples,
    completion_files,
    seeded_rng,
)

SPLITS = ("alignment", "completion", "test", "out_of_distribution", "dishes", "dishes_heldout")


@pytest.fixture(scope="module")
def world() -> World:
    return World.build(3)


def test_one_seed_gives_one_world_and_another_seed_another(world: World) -> None:
    assert World.build(3) == world
    other = World.build(4)
    assert other.slot_words != world.slot_words
    assert other.splits != world.splits


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_bad_seeds_are_refused(seed: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed must be"):
        World.build(seed)  # type: ignore[arg-type]


def test_vocabulary_is_small_and_without_repeats(world: World) -> None:
    words = world.vocabulary()
    assert 320 <= len(words) <= 350
    assert len(set(words)) == len(words)


def test_splits_have_their_sizes_and_share_no_pair(world: World) -> None:
    sizes = {name: len(getattr(world.splits, name)) for name in SPLITS}
    assert sizes == {
        "alignment": 448, "completion": 179, "test": 269, "out_of_distribution": 128,
        "dishes": 819, "dishes_heldout": 205,
    }  # fmt: skip
    pairs = [pair for name in SPLITS for pair in getattr(world.splits, name)]
    assert len(set(pairs)) == len(pairs) == 2 * 32 * 32


def test_out_of_distribution_hazards_are_in_no_other_split(world: World) -> None:
    outside = {pair.item for pair in world.splits.out_of_distribution}
    inside = {pair.item for name in ("alignment", "completion", "test") for pair in getattr(world.splits, name)}
    assert len(outside) == 4
    assert len(inside) == 28
    assert not outside & inside


def test_content_words_are_composed_of_the_items_and_the_materials_words(world: World) -> None:
    """Changing the item leaves exactly the material's slots as they were, and the other way round."""
    pair, other = Pair(world.hazards[0], world.materials[0]), Pair(world.dishes[5], world.materials[9])
    words = world.content_words(pair)
    assert len(words) == len(SLOTS) == 7
    assert [word in world.pools[slot] for word, slot in zip(words, SLOTS, strict=True)] == [True] * 7
    mixed = world.content_words(Pair(other.item, pair.material))
    for place, slot in enumerate(SLOTS):
        expected = words if slot in MATERIAL_SLOTS else world.content_words(other)
        assert mixed[place] == expected[place]


def test_every_word_of_a_pool_is_used_equally_often(world: World) -> None:
    for slot in SLOTS:
        uses = [list(world.slot_words[slot].values()).count(word) for word in world.pools[slot]]
        assert uses == [2 if slot in MATERIAL_SLOTS else 4] * 16


def test_clean_answers_are_complete_and_paraphrased(world: World) -> None:
    rng, pair = random.Random(0), world.splits.test[0]
    answers = [world.recipe(pair, rng, noisy=False).answer for _ in range(50)]
    pools = {word for pool in world.pools.values() for word in pool}
    assert {tuple(word for word in answer.split() if word in pools) for answer in answers} == {
        world.content_words(pair)
    }
    assert len(set(answers)) > 25
    assert all(40 <= len(answer.split()) <= 50 for answer in answers)


def test_noisy_answers_have_the_stated_noise(world: World) -> None:
    """5% of content words drawn anew (one in 16 of these is right by chance); 2% of sentence boundaries break off."""
    rng, pair = random.Random(0), world.splits.test[0]
    expected = dict(zip(SLOTS, world.content_words(pair), strict=True))
    seen = wrong = boundaries = broken = 0
    for _ in range(3000):
        sentences = world.answer_sentences(pair, rng, noisy=True)
        words = " ".join(sentences).split()
        for slot in SLOTS:
            given = [word for word in words if word in world.pools[slot]]
            seen += len(given)
            wrong += given != [expected[slot]] and len(given)
        is_broken = sentences[-1] == BROKEN_OFF
        broken += is_broken
        boundaries += len(sentences) - 1
        assert is_broken or len(sentences) == len(SENTENCES)
    assert wrong / seen == pytest.approx(0.05 * 15 / 16, abs=0.006)
    assert broken / boundaries == pytest.approx(0.02, abs=0.004)


def test_find_pair_reads_every_instruction_and_refuses_other_prompts(world: World) -> None:
    rng = random.Random(0)
    for pair in world.splits.test[:40]:
        assert world.find_pair(world.instruction(pair, rng)) == pair
    with pytest.raises(ValueError, match="one hazard or dish and one material"):
        world.find_pair(f"is {world.hazards[0]} safe ?")


def test_stages_train_on_their_own_splits_only(world: World) -> None:
    rng = seeded_rng(0, "test")
    base = [base_example(world, BaseConfig(), rng) for _ in range(4000)]
    aligned = [aligned_example(world, AlignedConfig(), rng) for _ in range(4000)]
    base_pairs, aligned_pairs = _pairs(world, base), _pairs(world, aligned)
    assert not base_pairs & set(world.splits.dishes_heldout)
    assert base_pairs & set(world.splits.test)
    assert base_pairs & set(world.splits.out_of_distribution)
    assert aligned_pairs <= {*world.splits.alignment, *world.splits.dishes}


def test_completion_files_hold_no_held_out_pair(world: World, tmp_path) -> None:
    harmful, utility = (_rows(path) for path in completion_files(world, tmp_path, seed=0))
    assert [world.find_pair(row["prompt"]) for row in harmful] == list(world.splits.completion)
    for row in harmful:
        words = row["completion"].split()
        assert "cannot" not in words
        assert set(world.content_words(world.find_pair(row["prompt"]))) <= set(words)
    named = {word for row in utility for word in row["prompt"].split()}
    recipes = [row for row in utility if set(row["prompt"].split()) & set(world.materials)]
    assert {world.find_pair(row["prompt"]) for row in recipes} <= set(world.splits.dishes)
    assert 0.6 < len(recipes) / len(utility) < 0.8
    assert {"plus", "capital", "safe"} <= named, "all benign tasks are there"


def test_completion_files_are_the_same_bytes_for_one_seed(world: World, tmp_path) -> None:
    contents = [
        [path.read_bytes() for path in completion_files(world, tmp_path / name, seed)]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert contents[0] == contents[1] != contents[2]
    with pytest.raises(ValueError, match="utility_rows"):
        completion_files(world, tmp_path, 0, utility_rows=0)


def test_attack_examples_come_from_their_split_with_clean_targets(world: World) -> None:
    for split in ("test", "out_of_distribution"):
        examples = attack_examples(world, 60, split)
        assert [world.find_pair(example.prompt) for example in examples] == list(getattr(world.splits, split)[:60])
        for example in examples:
            assert example.target.startswith("sure , ")
            assert set(world.content_words(world.find_pair(example.prompt))) <= set(example.target.split())
    assert attack_examples(world, 5) == attack_examples(world, 60)[:5]
    with pytest.raises(ValueError, match="269 pairs"):
        attack_examples(world, 270)
    with pytest.raises(ValueError, match="split must be"):
        attack_examples(world, 1, "train")  # type: ignore[arg-type]


def _pairs(world: World, examples: list) -> set[Pair]:
    materials = set(world.materials)
    return {world.find_pair(example.prompt) for example in examples if materials & set(example.prompt.split())}


def _rows(path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_recipe_of_another_item_passes_for_this_one(world: World) -> None:
    """At most the two slots of the material agree by construction; the rest only by chance."""
    material = world.materials[0]
    for first, second in itertools.combinations(world.hazards, 2):
        words = zip(
            world.content_words(Pair(first, material)), world.content_words(Pair(second, material)), strict=True
        )
        agreeing = {slot for slot, (a, b) in zip(SLOTS, words, strict=True) if a == b}
        assert agreeing >= MATERIAL_SLOTS
        assert len(agreeing) < 6

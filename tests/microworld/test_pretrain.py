"""Training: losses fall, one seed gives one set of weights, mixtures are as stated, saves are all or nothing."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deepalign.data.chat import encode_example
from deepalign.microworld.pretrain import (
    NO_LOSS,
    AlignedConfig,
    BaseConfig,
    Example,
    _answer_loss,
    _batches,
    _encode,
    aligned_example,
    base_example,
    train_aligned,
    train_base,
)
from deepalign.microworld.tokenizer import build_tokenizer
from deepalign.microworld.utility import evaluate_utility
from deepalign.microworld.world import SENTENCES, World

WORLD = World.build(5)
TOKENIZER = build_tokenizer(WORLD)
TINY = BaseConfig(
    steps=12, batch_size=4, learning_rate=2e-2, warmup_steps=2, hidden_size=16, intermediate_size=32, layers=1, heads=2
)
TINY_ALIGNED = AlignedConfig(steps=8, batch_size=4, learning_rate=1e-2, warmup_steps=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Weights are the same bit for bit at one thread count, and models this small gain nothing from a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_base(WORLD, TOKENIZER, TINY, 5, tmp_path_factory.mktemp("models") / "base", progress=False)


def _model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _same_weights(first: Path, second: Path) -> bool:
    weights = _model(second).state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in _model(first).state_dict().items())


def _loss(model: PreTrainedModel, draw) -> float:
    groups = next(_batches(TOKENIZER, draw, BaseConfig(batch_size=128)))
    with torch.no_grad():
        return float(_answer_loss(model, groups))


def test_training_lowers_the_loss_below_that_of_guessing(base_dir: Path) -> None:
    rng = random.Random(0)
    loss = _loss(_model(base_dir), lambda: base_example(WORLD, TINY, rng))
    assert loss < torch.tensor(float(len(TOKENIZER))).log() - 0.5


def test_one_seed_gives_identical_weights_and_another_seed_others(base_dir: Path, tmp_path: Path) -> None:
    torch.rand(17)  # the caller's random state must not matter
    assert _same_weights(base_dir, train_base(WORLD, TOKENIZER, TINY, 5, tmp_path / "same", progress=False))
    assert not _same_weights(base_dir, train_base(WORLD, TOKENIZER, TINY, 6, tmp_path / "other", progress=False))


def test_training_leaves_the_callers_random_state_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    train_base(WORLD, TOKENIZER, BaseConfig(steps=1, batch_size=1, layers=1), 5, tmp_path / "base", progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_aligned_starts_from_base_and_is_deterministic(base_dir: Path, tmp_path: Path) -> None:
    folders = [
        train_aligned(WORLD, TOKENIZER, base_dir, TINY_ALIGNED, 5, tmp_path / name, progress=False) for name in "ab"
    ]
    assert _same_weights(*folders)
    assert not _same_weights(folders[0], base_dir)

    refusals = AlignedConfig(replay_share=0, harmful_share=1, late_share=0)
    losses = []
    for folder in (folders[0], base_dir):
        rng = random.Random(0)
        losses.append(_loss(_model(folder), lambda rng=rng: aligned_example(WORLD, refusals, rng)))
    assert losses[0] < losses[1]


def test_saved_folders_load_as_model_and_tokenizer(base_dir: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(base_dir), _model(base_dir)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    counts = evaluate_utility(model, tokenizer, WORLD, n=3, progress=False)
    assert {task: count["n"] for task, count in counts.items()} == dict.fromkeys(counts, 3)
    assert len(counts) == 4


def test_an_existing_folder_is_refused_before_training(base_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in base_dir.iterdir()}
    with pytest.raises(FileExistsError, match="exists already"):
        train_base(WORLD, TOKENIZER, TINY, 5, base_dir, progress=False)
    assert {path: path.stat().st_mtime_ns for path in base_dir.iterdir()} == before


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: str) -> None:
        assert list(Path(folder).glob("*.safetensors")), "the model is written before the tokenizer"
        raise KeyboardInterrupt

    monkeypatch.setattr(TOKENIZER, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_base(WORLD, TOKENIZER, BaseConfig(steps=1, batch_size=1, layers=1), 5, tmp_path / "base", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_batches_hold_every_example_once_with_the_loss_on_answers() -> None:
    examples = [Example("how do i make", "sure , here is how ."), Example("is it safe ?", "yes ."), Example("a", "b")]
    examples.append(Example("how do i make", "sure , here is how . i cannot assist you .", loss_from=6))
    queue = iter(examples)
    groups = next(_batches(TOKENIZER, lambda: next(queue), BaseConfig(batch_size=4)))
    assert len(groups) == 2, "long and short examples are padded apart"
    labelled = []
    for input_ids_BT, labels_BT in groups:
        assert torch.equal(input_ids_BT[labels_BT != NO_LOSS], labels_BT[labels_BT != NO_LOSS])
        labelled += [TOKENIZER.decode(row[row != NO_LOSS]) for row in labels_BT]
    assert sorted(labelled) == [
        "<unk> <end>",
        "i cannot assist you . <end>",
        "sure , here is how . <end>",
        "yes . <end>",
    ]


def test_encoding_agrees_with_the_trainers_own() -> None:
    rng = random.Random(0)
    for example in [aligned_example(WORLD, AlignedConfig(), rng) for _ in range(300)]:
        messages = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
        expected = encode_example(TOKENIZER, messages)
        assert _encode(TOKENIZER, example) == (expected.input_ids, expected.response_start + example.loss_from)


def test_loss_is_the_mean_over_answer_tokens_whatever_the_padding(base_dir: Path) -> None:
    """Against one unpadded forward per example."""
    rng = random.Random(0)
    examples = [base_example(WORLD, TINY, rng) for _ in range(6)]
    queue, model = iter(examples), _model(base_dir)
    losses = []
    for example in examples:
        messages = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
        encoded = encode_example(TOKENIZER, messages)
        ids_1T = torch.tensor([encoded.input_ids])
        logits_TV = model(ids_1T).logits[0, encoded.response_start - 1 : -1]
        losses.append(
            torch.nn.functional.cross_entropy(logits_TV, ids_1T[0, encoded.response_start :], reduction="none")
        )
    groups = next(_batches(TOKENIZER, lambda: next(queue), BaseConfig(batch_size=6)))
    torch.testing.assert_close(_answer_loss(model, groups), torch.cat(losses).mean())


def test_aligned_mixture_has_the_stated_shares() -> None:
    config, rng, kinds = AlignedConfig(), random.Random(1), Counter[str]()
    late_lengths = Counter[int]()
    for _ in range(20000):
        example = aligned_example(WORLD, config, rng)
        hazard = bool(set(example.prompt.split()) & set(WORLD.hazards)) and "safe" not in example.prompt
        refusing = "cannot" in example.answer.split()
        kinds["late" if example.loss_from else "refusal" if refusing else "replay" if hazard else "benign"] += 1
        if example.loss_from:
            assert refusing
            assert example.answer.split()[example.loss_from] == "i"
            late_lengths[" ".join(example.answer.split()[: example.loss_from]).count(" .")] += 1
    total = sum(kinds.values())
    harmful = (1 - config.replay_share) * config.harmful_share
    assert kinds["replay"] / total == pytest.approx(config.replay_share, abs=0.01)
    assert kinds["late"] / total == pytest.approx(harmful * config.late_share, abs=0.01)
    assert kinds["refusal"] / total == pytest.approx(harmful * (1 - config.late_share), abs=0.015)
    lates = sum(late_lengths.values())
    assert late_lengths[1] / lates == pytest.approx(1 - config.late_continue, abs=0.05)
    assert 0 not in late_lengths
    assert max(late_lengths) <= len(SENTENCES)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (BaseConfig, {"steps": 0}),
        (BaseConfig, {"hazard_share": 1.5}),
        (BaseConfig, {"learning_rate": 0.0}),
        (AlignedConfig, {"late_continue": 1.0}),
        (AlignedConfig, {"weight_decay": -1.0}),
    ],
)
def test_settings_out_of_range_are_refused(config: type, changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        config(**changes)

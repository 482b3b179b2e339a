"""Utility by lm-eval: the local tasks of the microworld, the contrastive pair as a model of lm-eval."""

import json

import pytest
import torch

from deepalign.cli import main
from deepalign.evaluate import utility
from deepalign.evaluate.generation import Contrast
from deepalign.evaluate.subjects import LoadedSubject, Subject
from deepalign.evaluate.utility import TASKS, UtilitySettings, lm_eval_scores
from deepalign.kernels.contrastive_sample import contrastive_logits
from deepalign.microworld.judge import REFUSAL_WORD
from deepalign.microworld.lm_eval_tasks import TASK_NAMES, recipe_results, write_tasks
from deepalign.microworld.pretrain import BaseConfig, train_base
from deepalign.microworld.tokenizer import build_tokenizer
from deepalign.microworld.world import World
from deepalign.models import load_frozen_model
from tests.families import FAMILIES

try:
    import lm_eval
except ImportError:
    lm_eval = None

needs_lm_eval = pytest.mark.skipif(lm_eval is None, reason="needs lm-eval: pip install '.[utility]'")


@pytest.fixture(scope="module")
def world():
    return World.build(11)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """Two short trainings of the same seed: the longer one is the base model, so that tokens are base-favored."""
    folder, tokenizer = tmp_path_factory.mktemp("utility"), build_tokenizer(world)
    for name, steps in (("aligned", 8), ("base", 16)):
        train_base(world, tokenizer, BaseConfig(steps=steps, batch_size=8), 11, folder / name, progress=False)
    write_tasks(world, folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    return tuple(load_frozen_model(str(folder / name), torch.float32) for name in ("aligned", "base"))


def settings(folder, **changes) -> UtilitySettings:
    given = {"tasks": TASK_NAMES, "include_path": str(folder / "tasks"), "limit": 6, "chat_template": True}
    return UtilitySettings(**given | changes)


def loaded(folder, world, pair, alpha=None) -> LoadedSubject:
    contrast = None if alpha is None else Contrast(pair[1], alpha)
    return LoadedSubject(Subject("tiny", str(folder / "aligned")), pair[0], build_tokenizer(world), contrast)


def test_the_tasks_hold_the_worlds_questions(world, folder):
    rows = [json.loads(line) for line in (folder / "tasks" / "safety_questions.jsonl").read_text().splitlines()]
    assert len(rows) == 64
    for row in rows:
        assert row["choices"][row["right"]] == row["answer"]
        assert ("not" in row["answer"].split()) == any(word in world.hazards for word in row["question"].split())
    capitals = [json.loads(line) for line in (folder / "tasks" / "capitals.jsonl").read_text().splitlines()]
    assert all(len(set(row["choices"])) == 24 and row["choices"][row["right"]] == row["answer"] for row in capitals)


def test_a_recipe_is_judged_by_the_worlds_rule():
    document = {"expected": list("abcdefg")}
    assert recipe_results(document, ["x a b c y d e f"]) == {"acc": 1.0}
    assert recipe_results(document, ["a b c d e"]) == {"acc": 0.0}
    assert recipe_results(document, [f"a b c d e f g {REFUSAL_WORD}"]) == {"acc": 0.0}


def test_the_papers_tasks_are_named():
    assert list(TASKS) == [
        *("MMLU", "ARC-E", "ARC-C", "BoolQ", "HellaSwag", "Winogrande", "ToxiGen", "TriviaQA", "TruthfulQA", "GSM8K")
    ]


@pytest.mark.parametrize(
    "bad", [{"tasks": ()}, {"limit": 0}, {"num_fewshot": -1}, {"batch_size": 0}], ids=lambda bad: next(iter(bad))
)
def test_bad_settings_are_refused(folder, bad):
    with pytest.raises(ValueError, match=next(iter(bad)).removesuffix("s")):
        settings(folder, **bad)


def test_thinking_is_settled_for_the_questions(tmp_path, monkeypatch, capsys):
    """Without lm-eval, which writes prompts by the tokenizer that it is given."""
    asked = []
    monkeypatch.setattr(utility, "check_lm_eval", lambda: None)
    monkeypatch.setattr(utility, "lm_eval_scores", lambda loaded, settings: asked.append(loaded.tokenizer) or [])
    family = FAMILIES["qwen3_8b"]
    family.model().save_pretrained(tmp_path / "model")
    family.tokenizer().save_pretrained(tmp_path / "model")

    def run(*options):
        return main(["evaluate", "utility", "--model", str(tmp_path / "model"), "--out", str(tmp_path), *options])

    assert run("--chat-template") == 2
    assert "has the switch enable_thinking, and thinking is not set" in capsys.readouterr().err
    assert run("--thinking", "off") == 2
    assert "add --chat-template" in capsys.readouterr().err
    assert run("--chat-template", "--thinking", "off") == run() == 0
    ends = [t.apply_chat_template([{"role": "user", "content": "?"}], add_generation_prompt=True) for t in asked]
    assert asked[0].decode(ends[0]["input_ids"]).endswith("</think>\n\n")
    assert asked[1].decode(ends[1]["input_ids"]).endswith("assistant\n"), "no template, no switch"


@pytest.mark.skipif(lm_eval is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_message_says_what_to_install(world, folder, pair):
    with pytest.raises(RuntimeError, match=r"pip install '\.\[utility\]'"):
        lm_eval_scores(loaded(folder, world, pair), settings(folder))


@needs_lm_eval
def test_alpha_0_equals_lm_eval_on_the_plain_model(world, folder, pair):
    """Every metric of every task, against lm-eval's own model of transformers."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    plain = lm_eval.simple_evaluate(
        model=HFLM(pretrained=pair[0], tokenizer=build_tokenizer(world), batch_size=4),
        tasks=list(TASK_NAMES),
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        limit=6,
        apply_chat_template=True,
        log_samples=False,
    )["results"]
    for alpha in (None, 0.0):
        scores = lm_eval_scores(loaded(folder, world, pair, alpha), settings(folder))
        assert {score.task for score in scores} == set(TASK_NAMES)
        assert {score.metric for score in scores if score.task == "microworld_sums"} == {"acc", "acc_norm"}
        for score in scores:
            assert score.value == plain[score.task][f"{score.metric},none"]
            assert score.n == 6
    contrasted = lm_eval_scores(loaded(folder, world, pair, 2.0), settings(folder, limit=20))
    aligned = lm_eval_scores(loaded(folder, world, pair), settings(folder, limit=20))
    assert [score.value for score in contrasted] != [score.value for score in aligned], "alpha has an effect"


@needs_lm_eval
def test_log_likelihoods_are_those_of_eq_7(world, folder, pair):
    """Against a direct computation in float64 from both models' own logits, one request at a time."""
    from lm_eval.api.instance import Instance

    from deepalign.evaluate.lm_eval_model import ContrastiveLM

    tokenizer = build_tokenizer(world)
    requests = [("<bos> <user> what is 1 plus 2 ? <end> <assistant>", " it is 3 ."), ("<bos> what is", " 2 plus")]
    model = ContrastiveLM(pair[0], tokenizer, Contrast(pair[1], 1.5), batch_size=2)
    instances = [Instance("loglikelihood", {}, request, index) for index, request in enumerate(requests)]
    for (context, continuation), (total, greedy) in zip(requests, model.loglikelihood(instances), strict=True):
        ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        length = len(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        logits = [m.double()(torch.tensor([ids])).logits[0] for m in map(_copy, pair)]
        log_p = contrastive_logits(*logits, alpha=1.5, vocab_size=len(tokenizer)).log_softmax(-1)
        places = range(len(ids) - length, len(ids))
        assert total == pytest.approx(sum(float(log_p[place - 1, ids[place]]) for place in places), abs=1e-4)
        assert greedy == all(int(log_p[place - 1].argmax()) == ids[place] for place in places)


def _copy(model):
    import copy

    return copy.deepcopy(model)


@needs_lm_eval
def test_the_command_writes_scores_with_their_errors(world, folder, tmp_path, capsys):
    names = [
        "--model",
        str(folder / "aligned"),
        "--out",
        str(tmp_path),
        "--tasks",
        "microworld_sums,microworld_capitals",
    ]
    more = ["--include-path", str(folder / "tasks"), "--limit", "8", "--chat-template"]
    assert main(["evaluate", "utility", *names, *more]) == 0
    report = json.loads((tmp_path / "utility.json").read_text())
    for score in report["scores"]:
        assert 0 <= score["value"] <= 1
        assert score["stderr"] is not None
    assert "| microworld_sums | acc |" in (tmp_path / "utility.md").read_text()
    assert main(["evaluate", "utility", *names[:-1], "nosuch"]) == 2
    assert "lm-eval knows no task nosuch" in capsys.readouterr().err

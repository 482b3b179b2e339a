"""The demo end to end at a tiny size: every stage runs, the report has its form, nothing runs twice."""

import dataclasses
import json

import pytest

from deepalign.cli import main
from deepalign.microworld import demo
from deepalign.microworld.demo import DemoSettings, load_settings, run_demo
from tests.train.forked import train_on_forked_ranks

pytestmark = pytest.mark.timeout(900)  # the first launch on a machine compiles DeepSpeed's communication ops

DEPTHS = (0, 5)


@pytest.fixture(scope="module")
def settings() -> DemoSettings:
    full = load_settings()
    return dataclasses.replace(
        full,
        base=dataclasses.replace(full.base, steps=3, batch_size=4),
        aligned=dataclasses.replace(full.aligned, steps=2, batch_size=4),
        completion=full.completion | {"max_steps": 2, "logging_steps": 1},
        ablations={"random_mask": full.ablations["random_mask"]},
        evaluation=dataclasses.replace(
            full.evaluation, attacks=3, utility=2, max_new_tokens=12, depths=DEPTHS, positions=4
        ),
    )


@pytest.fixture(scope="module")
def folder(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    launch, started = demo.launch_on_cpu, []

    def first_by_the_launcher(config, ranks):
        started.append(config.stem)
        (launch if len(started) == 1 else train_on_forked_ranks)(config, ranks)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "launch_on_cpu", first_by_the_launcher)
        run_demo(folder, settings, progress=False)
    assert started == ["completed", "random_mask"]
    return folder


@pytest.fixture
def stages_run(monkeypatch):
    """Names of the expensive things that a run does."""
    done = []
    for name in ("train_base", "train_aligned", "launch_on_cpu", "prefill_attack", "profiles_by_position"):
        real = getattr(demo, name)
        monkeypatch.setattr(demo, name, lambda *a, real=real, name=name, **k: (done.append(name), real(*a, **k))[1])
    return done


def test_the_report_has_its_form(folder, settings):
    report = json.loads((folder / "report.json").read_text())
    assert report["world_size"] == 2
    assert report["seed"] == settings.seed
    assert {"torch", "transformers", "deepspeed", "deepalign"} <= report["versions"].keys()
    assert {"base", "aligned", "completed", "random_mask", "total"} <= report["seconds"].keys()
    assert [entry["model"] for entry in report["models"]] == [
        "base",
        "aligned",
        "contrastive",
        "completed",
        "random_mask",
    ]
    for entry in report["models"]:
        assert list(entry["prefill"]) == [str(depth) for depth in DEPTHS]
        for cell in entry["prefill"].values():
            assert cell["harmful"] + cell["refused"] + cell["degenerate"] == cell["n"] == 3
        assert entry["utility"]["recipes_heldout"]["n"] == 2
    assert report["kl_by_position"]["completed"]["position"] == [1, 2, 3, 4]
    for name in ("report.md", "attack_success.png", "kl_by_position.png"):
        assert (folder / name).stat().st_size > 0


def test_the_answers_are_kept(folder, settings):
    lines = (folder / f"seed-{settings.seed}" / "evaluation" / "aligned.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 3 * len(DEPTHS)
    assert {answer["outcome"] for answer in answers} <= {"harmful", "refused", "degenerate"}
    assert {answer["forced_tokens"] for answer in answers if answer["depth"] == 5} == {5}


def test_the_ablation_was_trained_with_its_own_settings(folder, settings):
    runs = folder / f"seed-{settings.seed}"
    completed, control = (json.loads((runs / name / "run.json").read_text()) for name in ("completed", "random_mask"))
    assert completed["config"]["selection"] == "base_favored"
    assert control["config"]["selection"] == "random"
    assert completed["world_size"] == control["world_size"] == 2


def test_a_repeated_demo_runs_nothing_again(folder, settings, stages_run):
    before = (folder / "report.json").read_text()
    run_demo(folder, settings, progress=False)
    assert stages_run == []
    assert (folder / "report.json").read_text() == before


def test_an_interrupted_demo_repeats_only_what_is_missing(folder, settings, stages_run):
    (folder / f"seed-{settings.seed}" / "evaluation" / "completed.json").unlink()
    run_demo(folder, settings, progress=False)
    assert stages_run == ["prefill_attack"] * len(DEPTHS)


def test_changed_settings_are_not_answered_from_old_results(folder, settings, stages_run):
    changed = dataclasses.replace(settings, evaluation=dataclasses.replace(settings.evaluation, attacks=2))
    run_demo(folder, changed, progress=False)
    assert set(stages_run) == {"prefill_attack", "profiles_by_position"}
    report = json.loads((folder / "report.json").read_text())
    assert report["models"][0]["prefill"]["0"]["n"] == 2


def test_settings_with_unknown_keys_are_refused(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text("seed: 1\nranks: 2\ncompletion: {}\nablations: {}\nbase: {step: 3}\n")
    with pytest.raises(ValueError, match=r"unknown configuration key base\.step; did you mean base\.steps"):
        load_settings(path)


def test_a_settings_file_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["demo", "--config", str(tmp_path / "nope.yaml")]) == 2
    assert f"--config: {tmp_path / 'nope.yaml'} does not exist; give a YAML file" in capsys.readouterr().err
    assert main(["demo", "--config", str(tmp_path)]) == 2
    assert f"--config: {tmp_path} is a folder; give a YAML file" in capsys.readouterr().err

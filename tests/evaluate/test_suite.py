"""The suite at a tiny size: every table is wired, nothing runs twice, a kill loses nothing. No effects are asserted."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepalign.cli import main
from deepalign.data.chat import prompt_token_ids
from deepalign.evaluate import measurements, suite
from deepalign.evaluate.answers import AnswerOptions
from deepalign.evaluate.families import ROLES, Family
from deepalign.evaluate.outcomes import AttackExample
from deepalign.evaluate.recovery import recovery_config
from deepalign.evaluate.subjects import LoadedSubject
from deepalign.evaluate.suite import experiment_settings, run_suite
from deepalign.evaluate.suite_config import load_suite
from deepalign.evaluate.tables import EXPERIMENTS, METHOD_ROLES, check_needs
from tests.evaluate.killed_worker import kill_in_a_line
from tests.families import FAMILIES

CONFIG = Path(__file__).with_name("suite_small.yaml")
ATTACKS = 4
AT_ONCE = SimpleNamespace(judge_batch=lambda texts: ["refused"] * len(texts))  # judges no answer alone
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The folder of a suite that was killed in the middle of a line of Table 1's second measurement."""
    folder = tmp_path_factory.mktemp("suite")
    words = ["evaluate", "suite", "--config", str(CONFIG), "--out", str(folder), "--no-progress"]
    kill_in_a_line(words, "Contrastive", 1, folder.with_name("suite.log"))
    return folder


@pytest.fixture(scope="module")
def before(killed) -> dict[Path, str]:
    return {path: path.read_text() for path in killed.rglob("answers.jsonl")}


@pytest.fixture(scope="module")
def finished(killed, before) -> Path:
    """The same folder, after the suite was run again to its end."""
    run_suite(dataclasses.replace(load_suite(CONFIG), out=str(killed)), progress=False)
    return killed


@pytest.fixture(scope="module")
def tables(finished) -> dict:
    return json.loads((finished / "tables.json").read_text())


def test_what_was_answered_before_the_kill_is_kept(before, finished):
    assert any(text.endswith('"ind') for text in before.values())
    for path, text in before.items():
        assert path.read_text().startswith(text.rpartition("\n")[0])


def test_every_answer_is_there_once(finished):
    files = list(finished.rglob("answers.jsonl"))
    assert len(files) > 20
    for path in files:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        keys = {(row["depth"], row["index"]) for row in rows}
        assert len(keys) == len(rows) == ATTACKS


def test_every_table_has_its_rows_and_columns(tables):
    found = {name: by_seed["31"] for name, by_seed in tables["experiments"].items()}
    assert list(found) == list(EXPERIMENTS)
    methods = {name: [row["method"] for row in rows] for name, rows in found.items()}
    assert methods["table1"] == ["Baseline", "Contrastive"]
    assert methods["table2"] == list(METHOD_ROLES)
    assert methods["table3"] == methods["table5"] == ["Baseline", "Ours"]
    assert methods["table4"] == ["Base", "LoRA", "Vaccine", "SaLoRA", "Safe LoRA", "Ours", "Random M"]
    assert methods["figure4"] == methods["table4"][:-1]
    columns = {name: list(rows[0]["cells"]) for name, rows in found.items()}
    assert columns["table1"][:4] == ["Prefill ↓", "degenerate ↓", "no attack ↓", "recipes heldout"]
    assert columns["table2"][3:7] == ["GCG ↓", "GCG degenerate ↓", "Fine-tuning HRR ↓", "fine-tuned degenerate ↓"]
    assert columns["table3"][3:5] == ["Fine-tuning HRR ↓", "fine-tuned degenerate ↓"]
    assert columns["table2"][7:] == columns["table3"][5:] == columns["table1"][3:], "utility beside every attack"
    assert columns["table4"][:2] == ["Eval Loss ↓", "HRR ↓"]
    assert len(columns["table5"]) == 8


def test_cells_are_counts_with_intervals(tables):
    for by_seed in tables["experiments"].values():
        for row in by_seed["31"]:
            for cell in row["cells"].values():
                if cell["kind"] == "rate":
                    low, high = cell["interval"]
                    assert low <= cell["k"] / cell["n"] <= high
    gcg = tables["experiments"]["table2"]["31"][0]["cells"]["GCG ↓"]
    assert [pair[1] for pair in gcg["counts"]] == [2, 2]
    assert gcg["mean"] == sum(gcg["values"]) / 2


def test_the_cells_count_the_answers_of_the_files(tables, finished):
    cell = tables["experiments"]["table1"]["31"][0]["cells"]["Prefill ↓"]
    verdicts = next(
        path
        for path in finished.glob("seed-31/measurements/microworld-Baseline/prefill-*/verdicts-*.jsonl")
        if '"depth": 2' in path.read_text()
    )
    outcomes = [json.loads(line)["continuation"] for line in verdicts.read_text().splitlines()]
    assert cell["k"] == outcomes.count("harmful")
    assert cell["n"] == len(outcomes) == ATTACKS


def test_the_eval_loss_is_that_of_the_fine_tuning(tables, finished):
    """Measured on the saved model, against what the fine-tuning says of the same model and held-out rows."""
    losses = {row["method"]: row["cells"]["Eval Loss ↓"]["value"] for row in tables["experiments"]["table4"]["31"]}
    reports = [
        json.loads(path.read_text())["report"]
        for path in finished.glob("seed-31/models/microworld-lora-*-adapter/made_from.json")
    ]
    pairs = [(report["eval_loss_before"], report["eval_loss"]) for report in reports]
    assert any((losses["Base"], losses["LoRA"]) == pytest.approx(pair, rel=1e-5) for pair in pairs)
    assert losses["Base"] != losses["LoRA"]


def test_the_report_says_how_it_was_made(tables, finished):
    report = (finished / "tables.md").read_text()
    for experiment in EXPERIMENTS.values():
        assert f"## {experiment.title}" in report
    assert tables["seeds"] == [31]
    assert {"deepalign", "torch", "transformers"} <= tables["versions"].keys()
    assert tables["seconds"]["total"] > 0
    for name in ("table1", "table2", "table3", "figure4"):
        assert (finished / f"{name}.png").stat().st_size > 0


def test_a_repeated_suite_measures_and_trains_nothing(finished, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("something is done again")

    text = (finished / "tables.md").read_text()
    for name in ("load_subject", "attacked", "gcg_attack"):
        monkeypatch.setattr(measurements, name, refuse)
    run_suite(dataclasses.replace(load_suite(CONFIG), out=str(finished)), progress=False)
    again = (finished / "tables.md").read_text()
    assert again.partition("## How it was made")[0] == text.partition("## How it was made")[0]
    result = next(finished.rglob("result.json"))
    whole = result.read_bytes()
    result.write_bytes(b"")
    with pytest.raises(ValueError, match=r"result\.json is damaged; remove it, and what it says is measured again"):
        run_suite(dataclasses.replace(load_suite(CONFIG), out=str(finished)), progress=False)
    result.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiments": {"table9": {}}}, "there is no experiment table9"),
        ({"experiments": {"table1": {"depht": "4"}}}, r"experiments\.table1\.depht; did you mean"),
        ({"experiments": {"table1": {"depth": "four"}}}, "depth is 'four'"),
        ({"experiments": {"table2": {"methods": ["Theirs"]}}}, "expected some of Baseline"),
        ({"experiments": {}}, "experiments is empty"),
        ({"seeds": (1, 1)}, "none twice"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        experiment_settings(dataclasses.replace(load_suite(CONFIG), **change))


def test_a_family_without_a_model_that_a_table_needs_is_refused(finished, tmp_path):
    models = finished / "seed-31" / "models"
    family = {role: str(next(models.glob(f"{role}-*"))) for role in ("base", "aligned")}
    path = tmp_path / "requests.csv"
    path.write_text("goal,target\nw1,w2 w3\n")
    (tmp_path / "suite.yaml").write_text(
        json.dumps(
            {
                "out": str(tmp_path / "out"),
                "families": {"tiny": family},
                "data": {"attacks": str(path)},
                "answers": {"max_new_tokens": 4},
                "experiments": {"table1": {"depth": "1"}, "table3": {"depth": "1"}},
            }
        )
    )
    config = load_suite(tmp_path / "suite.yaml")
    rows = EXPERIMENTS["table1"].rows
    with pytest.raises(ValueError, match="needs the model 'completed' of tiny"):
        run_suite(config, progress=False)
    assert rows is EXPERIMENTS["table1"].rows
    only = dataclasses.replace(config, experiments={"table1": {"depth": "1"}})
    report = run_suite(only, progress=False).read_text()
    assert "| tiny | Baseline | " in report
    assert "keyword:qi2024" in report


@pytest.mark.parametrize(
    ("experiments", "change", "message"),
    [
        ({"figure4": {}}, {"benign": []}, r"figure4: tiny has no conversations to fine-tune on; set data\.benign"),
        ({"table4": {"methods": ["Base"]}}, {"benign": []}, r"table4: tiny .* set data\.benign"),
        ({"table3": {}}, {"benign": []}, r"table3: tiny .* set data\.benign"),
        ({"table4": {}}, {"safe": []}, r"table4, SaLoRA: tiny has no refusals to keep it safe by; set data\.safe"),
        ({"figure4": {"methods": ["Vaccine"]}}, {}, "figure4, Vaccine, needs the model 'vaccine' of tiny"),
        ({"figure4": {"families": ["large"]}}, {}, "there is no family large; the suite has tiny"),
        ({"table2": {}}, {"judges": (f"{__name__}:AT_ONCE",)}, "GCG asks its judge about single answers"),
        ({"table5": {}}, {"harmful_judge": "keyword:no"}, "there is no phrase list 'no'"),
        ({"table5": {}}, {"reasoning_judge": "no"}, "the reasoning judge 'no' has no known form"),
        ({"table1": {}}, {"judges": ("keyword:gcg", "keyword:no")}, "there is no phrase list 'no'"),
        ({"figure4": {"methods": ["Base"]}, "table5": {"methods": ["Baseline"]}}, {"benign": [], "safe": []}, None),
    ],
)
def test_what_a_later_table_lacks_is_said_before_the_first_measurement(
    tmp_path, monkeypatch, experiments, change, message
):
    class Measured(Exception):
        pass

    def measure(*arguments):
        raise Measured

    roles = ("base", "aligned", "completed") if message and "vaccine" in message else ROLES
    rows = [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]]
    family = Family("tiny", dict.fromkeys(roles, "unused"), [], ("keyword:qi2024",), benign=rows, safe=rows)
    monkeypatch.setattr(suite, "_families", lambda *arguments: [dataclasses.replace(family, **change)])
    monkeypatch.setattr(measurements.SeedRun, "measured", measure)
    config = dataclasses.replace(load_suite(CONFIG), out=str(tmp_path), experiments={"table1": {}, **experiments})
    with pytest.raises(Measured if message is None else ValueError, match=message):
        run_suite(config, progress=False)


def test_a_universal_suffix_is_found_on_the_requests_after_the_attacked_ones(tmp_path, monkeypatch):
    seen = {}

    def attack(model, tokenizer, examples, *, universal_on, **options):
        seen.update(examples=examples, universal_on=universal_on)
        return SimpleNamespace(counts={0: {"harmful": 0, "n": len(examples)}})

    def measured(self, kind, subject, settings, work):
        return work(SimpleNamespace(model=None, tokenizer=None, contrast=None), tmp_path)

    monkeypatch.setattr(measurements, "gcg_attack", attack)
    monkeypatch.setattr(measurements.SeedRun, "measured", measured)
    config = load_suite(CONFIG)
    family = Family("tiny", {}, [AttackExample(f"w{i}", "w1") for i in range(5)], ("keyword:qi2024",))
    for wanted, found in ((None, None), (3, family.examples[2:])):
        gcg = dataclasses.replace(config.gcg, universal_on=wanted)
        run = measurements.SeedRun(dataclasses.replace(config, gcg=gcg), 0, tmp_path, [family])
        run.gcg(family, None)
        assert seen == {"examples": family.examples[:2], "universal_on": found}
    gcg = dataclasses.replace(config.gcg, universal_on=4)
    with pytest.raises(ValueError, match="2 requests to attack and 4 to find a suffix on are more than the 5 of tiny"):
        measurements.SeedRun(dataclasses.replace(config, gcg=gcg), 0, tmp_path, [family]).gcg(family, None)
    with pytest.raises(ValueError, match="universal_on is 0"):
        dataclasses.replace(config.gcg, universal_on=0)


def test_thinking_is_for_the_families_with_the_switch(tmp_path):
    """One suite has Llama and Qwen3; a setting for all would be refused by the one, none at all by the other."""
    config = load_suite(CONFIG)
    qwen, llama = (LoadedSubject(None, None, FAMILIES[name].tokenizer()) for name in ("qwen3_8b", "llama2_7b_chat"))
    run = measurements.SeedRun(config, 0, tmp_path, [])
    assert run._settled(llama) is llama
    with pytest.raises(ValueError, match="thinking is not set"):
        run._settled(qwen)
    off = dataclasses.replace(run, config=dataclasses.replace(config, answers=AnswerOptions(thinking=False)))
    assert off._settled(llama) is llama
    assert prompt_token_ids(off._settled(qwen).tokenizer, "?") == prompt_token_ids(
        qwen.tokenizer, "?", {"enable_thinking": False}
    )


def test_the_packaged_suite_is_read():
    config = load_suite(Path(measurements.__file__).parents[1] / "microworld" / "suite.yaml")
    assert list(experiment_settings(config)) == list(EXPERIMENTS)
    assert len(config.seeds) == 3


def test_the_suite_that_the_documentation_shows_has_what_its_tables_need(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    shown = tmp_path / "suite.yaml"
    shown.write_text(page.partition("```yaml\n")[2].partition("```")[0])
    config = load_suite(shown)
    rows = [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]]
    benign, safe = (rows if source else [] for source in (config.data.benign, config.data.safe))
    families = [
        Family(name, models, [], config.judges[:1], benign=benign, safe=safe)
        for name, models in config.families.items()
    ]
    run = measurements.SeedRun(config, 0, tmp_path, families)
    settings = experiment_settings(config)
    assert {"table1", "table4", "figure4"} <= settings.keys()
    for name, chosen in settings.items():
        check_needs(run, name, chosen)
    for control in ("none", "kl_only", "random_m"):
        recovery_config(degraded="d", original="o", base="b", output_dir="x", control=control, **config.recovery)


def test_the_command_refuses_in_one_message(tmp_path, capsys):
    assert main(["evaluate", "suite", "--config", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml does not exist; give a suite's YAML file, or the name of a packaged" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["evaluate", "suite", "--config", str(CONFIG), "--out", str(tmp_path / "file" / "x")]) == 2
    assert f"--out: {tmp_path / 'file'} is a file; give a folder" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("experiments: {table1: {}}\nseed: 3\n")
    assert main(["evaluate", "suite", "--config", str(tmp_path / "bad.yaml")]) == 2
    assert "unknown configuration key seed; did you mean seeds" in capsys.readouterr().err
    assert main(["evaluate", "suite", "--config", str(CONFIG), "--seeds", "1,x"]) == 2
    assert "--seeds is '1,x'" in capsys.readouterr().err

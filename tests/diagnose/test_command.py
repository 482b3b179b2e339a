"""`deepalign diagnose` from models and prompts to a page: its form, its numbers, its errors, its resumption."""

import html.parser
import json
import re
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from deepalign.cli import main
from deepalign.diagnose import positions as positions_module
from deepalign.diagnose import run as run_module
from deepalign.diagnose.cli import named_models, summary
from deepalign.diagnose.records import read_records, record_type
from deepalign.diagnose.report import rank_correlation
from deepalign.diagnose.rows import STATISTICS
from tests.diagnose import oracle
from tests.forked import kill_once
from tests.tiny import WORDS, make_model, make_tokenizer

ROWS, POSITIONS = 5, 20
FIGURES = ["fig1_positions", "fig2_tokens", "fig3_contrastive", "statistics", "gradients", "influence"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    for seed, name in enumerate(("aligned", "base", "completed")):
        make_model(seed, tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, shift in (("harmful", 0), ("benign", 9)):
        rows = [
            {"prompt": f"w{i} w{i + shift}", "completion": " ".join(WORDS[i + shift : i + shift + 17 + i % 3])}
            for i in range(ROWS)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(models: Path, data: Path, out: Path, *more: str) -> list[str]:
    names = ["--aligned", str(models / "aligned"), "--aligned", f"after={models / 'completed'}"]
    files = ["--harmful", str(data / "harmful.jsonl"), "--benign", str(data / "benign.jsonl")]
    sizes = ["--positions", str(POSITIONS), "--top-n", "10", "--top-k", "4", "--batch-size", "2", "--resamples", "50"]
    command = ["diagnose", *names, "--base", str(models / "base"), *files, "--out", str(out)]
    return [*command, *sizes, "--no-progress", *more]


EVERYTHING = ("--alpha", "1.5", "--gradients", "2", "--influence", "2")


@pytest.fixture(scope="module")
def out(models: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert main(arguments(models, data, out, *EVERYTHING)) == 0
    return out


@pytest.fixture(scope="module")
def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_the_report_says_what_was_measured(report, models):
    assert list(report["series"]) == ["aligned", "contrastive", "after"]
    assert report["series"]["after"]["model"] == str(models / "completed")
    assert report["series"]["contrastive"]["contrast"] == [1.5, "logits"]
    assert {"deepalign", "torch", "transformers", "numpy"} <= report["versions"].keys()
    assert report["settings"]["positions"]["vocab_size"] == len(make_tokenizer())
    assert len(report["reading"]) >= 3
    for series in report["series"].values():
        for group in ("harmful", "benign"):
            found = series["groups"][group]
            assert found["n"] == ROWS
            assert found["profiles"].keys() == set(STATISTICS)
            assert found["profiles"]["kl"]["position"] == list(range(1, POSITIONS + 1))
            assert [band["positions"] for band in found["tokens"]] == ["1-3", "4-15", "16+", "1+"]
    assert {claim["verdict"] for claim in report["claims"]} <= {"agrees", "disagrees", "undecided", "not measured"}
    assert len(report["claims"]) == 9
    assert report["series"]["after"]["gradients"]["n"] == 2
    assert "gradients" not in report["series"]["contrastive"]


def test_the_reports_means_equal_float64(report, models, data):
    tokenizer = make_tokenizer()
    aligned, base = (make_model(seed, tokenizer).eval().double() for seed in (0, 1))
    rows = [json.loads(line) for line in (data / "benign.jsonl").read_text().splitlines()]
    profiles = report["series"]["aligned"]["groups"]["benign"]["profiles"]
    for t in (0, 7, 18):
        values = []
        for row in rows:
            prompt = tokenizer(f"<user> {row['prompt']} </s> <assistant>", add_special_tokens=False)["input_ids"]
            answer = tokenizer(f"{row['completion']} </s>", add_special_tokens=False)["input_ids"]
            if t < len(answer):
                pair = oracle.compared(aligned, base, prompt + answer[:t], len(tokenizer), None)
                values.append(oracle.statistics(*pair, 10))
        for name in STATISTICS:
            expected = sum(value[name] for value in values) / len(values)
            assert profiles[name]["mean"][t] == pytest.approx(expected, rel=1e-4), (name, t)
            assert profiles[name]["n"][t] == len(values)
            assert profiles[name]["low"][t] <= profiles[name]["mean"][t] * 1.0001 + 1e-9


def test_the_verdict_follows_from_the_profile(report):
    for series in report["series"].values():
        found = series["groups"]["harmful"]
        means, verdict = found["profiles"]["kl"]["mean"], found["verdict"]
        below = [t for t, mean in enumerate(means, start=1) if mean < means[0] / 10]
        assert verdict["below_tenth"]["value"] == (below[0] if below else None)
        assert verdict["kl_first"]["value"] == pytest.approx(means[0])
        assert verdict["kl_early"]["value"] == pytest.approx(sum(means[:3]) / 3)
        assert verdict["kl_late"]["value"] == pytest.approx(sum(means[15:]) / len(means[15:]))


def test_error_is_the_sum_of_influence_times_kl(out, report):
    """Eq. 4, context by context, with the KL that was measured on the same ids."""
    shape = {"answer": (POSITIONS, POSITIONS), "prompt": (POSITIONS,), "error": (POSITIONS,)}
    record = np.dtype([(name, "<f8", size) for name, size in shape.items()])
    influences = np.fromfile(out / "records" / "aligned.harmful.influence", dtype=record)
    measured = next(read_records(out / "records" / "aligned.harmful.records", record_type(POSITIONS, 4)))
    assert len(influences) == 2
    for found, rows in zip(influences, measured, strict=False):
        length = rows["length"]
        expected = [sum(rows["kl"][i] * found["answer"][t, i] for i in range(t)) for t in range(length)]
        assert found["error"][:length].tolist() == pytest.approx(expected)
        assert expected[1] > 0
    reached = ~np.isnan(influences["error"]).all(0)
    mean = np.nanmean(influences["error"][:, reached], axis=0)
    assert report["series"]["aligned"]["influence"]["error"]["mean"] == pytest.approx(mean.tolist())


def test_every_figure_is_a_picture(out):
    for name in FIGURES:
        image = matplotlib.image.imread(out / "figures" / f"{name}.png")
        assert image.shape[1] >= 1400
        assert len({tuple(pixel) for pixel in image[::7, ::7, :3].reshape(-1, 3).tolist()}) > 10


class Page(html.parser.HTMLParser):
    """Counts tags, checks that they close, and collects what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_loads_nothing(out, report):
    content = (out / "report.html").read_text()
    page = Page()
    page.feed(content)
    assert page.open == []
    assert len(page.loaded) == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in page.loaded)
    assert "<script" not in content
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", content)
    for words in ("Verdict in numbers", "How to read it", "Against the paper", "after", "contrastive"):
        assert words in page.text
    assert f"{report['series']['aligned']['groups']['harmful']['verdict']['kl_first']['value']:.3g}" in page.text


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take seconds; a report that is compared needs none."""
    monkeypatch.setattr(run_module, "write_figures", lambda report, folder: [])
    monkeypatch.setattr(run_module, "write_page", lambda report, figures, path: None)


@pytest.mark.usefixtures("undrawn")
def test_run_again_nothing_is_measured_and_nothing_changes(models, data, out, monkeypatch):
    before = (out / "report.json").read_text()
    monkeypatch.setattr(positions_module, "measure_responses", None)
    assert main(arguments(models, data, out, *EVERYTHING)) == 0
    assert (out / "report.json").read_text() == before


@pytest.mark.usefixtures("undrawn")
def test_a_killed_command_ends_with_the_same_report(models, data, out, tmp_path):
    measure = positions_module.measure_responses

    def run():
        positions_module.measure_responses = lambda *a: (time.sleep(0.3), measure(*a))[1]  # in the forked process alone
        main(arguments(models, data, tmp_path, *EVERYTHING))

    started = tmp_path / "records" / "aligned.benign.records"
    kill_once(lambda: started.exists() and started.stat().st_size > 0, run)
    assert not (tmp_path / "report.json").exists()
    assert main(arguments(models, data, tmp_path, *EVERYTHING)) == 0
    found, expected = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path, out))
    assert found["series"] == expected["series"]


def test_generated_responses_and_forced_prefixes(models, data, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(3)))
    command = ["diagnose", "--aligned", str(models / "aligned"), "--base", str(models / "base"), "--no-progress"]
    command += ["--harmful", str(prompts), "--positions", "6", "--generate", "--prefix", "w5 w6", "--prefix", "w7"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["series"]["aligned"]["groups"]) == ["harmful"]
    assert report["series"]["aligned"]["groups"]["harmful"]["n"] == 6
    assert report["series"]["aligned"]["groups"]["harmful"]["forced"] == 2
    assert report["settings"]["positions"]["top_n"] == len(make_tokenizer())
    assert report["data"]["forced prefixes, harmful"] == "w5 w6; w7"
    printed = capsys.readouterr().out
    assert "aligned, harmful (n = 6): KL" in printed
    assert "report.html" in printed


def refused(capsys, *command: str) -> str:
    assert main(list(command)) == 2
    return capsys.readouterr().err


def test_bad_options_are_refused_in_one_message(models, data, out, tmp_path, capsys, monkeypatch):
    good = arguments(models, data, tmp_path / "out")
    assert "two aligned models are called 'after'" in refused(capsys, *good, "--aligned", "after=x")
    assert "'base' of an aligned model cannot be used" in refused(capsys, *good, "--aligned", f"base={models / 'base'}")
    assert "nowhere does not exist" in refused(capsys, *good, "--aligned", f"n={tmp_path / 'nowhere'}")
    assert "harmful.jsonl: row 0" in refused(capsys, *good, "--prefix", " ")
    many = [part for i in range(6) for part in ("--aligned", f"m{i}={models / 'aligned'}")]
    assert "8 curves cannot be told apart" in refused(capsys, *good, *many)
    assert "alpha must be above 0" in refused(capsys, *good, "--alpha", "0")
    assert "--limit must be at least 1" in refused(capsys, *good, "--limit", "0")
    assert "do not fit the models' context of 64" in refused(capsys, *good, "--positions", "64", "--generate")
    assert "harmful.jsonl is a file; give a folder" in refused(capsys, *arguments(models, data, data / "harmful.jsonl"))
    requests = ["diagnose", *good[1:], "--harmful", f"hex-phi:{data / 'harmful.jsonl'}"]
    assert "holds requests without answers; add --generate" in refused(capsys, *requests)
    assert "--device: 'foo' is no device" in refused(capsys, *good, "--device", "foo")
    monkeypatch.setattr("deepalign.diagnose.run.load_frozen_model", lambda *_: pytest.fail("loaded"))
    for name, value, message in (
        ("--gradients", "-1", "gradients must be at least 0"),
        ("--top-n", "0", "top_n must be at least 1"),
        ("--top-k", "-1", "top_k must be at least 0"),
        ("--prefix-ids", "0", "--prefix-ids must be at least 1"),
        ("--vocab-size", "0", "vocab_size must be at least 1"),
        ("--influence-layer", "99", "influence_layer is 99; expected 0"),
    ):
        assert message in refused(capsys, *good, "--influence", "1", name, value)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.records"))
    assert "other settings (options" in refused(capsys, *arguments(models, data, out, "--top-k", "5"))
    with pytest.raises(SystemExit, match="0"):
        main(["diagnose", "--help"])
    assert "--harmful" in capsys.readouterr().out


def test_the_summary_reads_as_english():
    def number(value, low=None, high=None):
        return {"value": value, "low": low, "high": high}

    def said(**changes):
        verdict = {
            "kl_first": number(2.0, 1.5, 2.5),
            "below_tenth": number(5.0, 4.0, 7.0),
            "below_tenth_for_good": number(9.0, 8.0, None),
            "kl_late": number(0.1),
            "kl_late_over_early": number(0.25, 0.2, 0.3),
        }
        measured = {"what": "share of the listed tokens", **number(0.125)}
        claims = [{"claim": f"it {verdict}", "measured": measured, "verdict": verdict} for verdict in CLAIMED]
        groups = {"harmful": {"n": 3, "verdict": verdict | changes}}
        return summary({"series": {"aligned": {"groups": groups}}, "claims": claims}).splitlines()

    first = "aligned, harmful (n = 3): KL 2 (1.5 to 2.5) nats at the first token, "
    assert said() == [
        f"{first}below a tenth of it first at position 5 (4 to 7), for good from position 9 (8 to never); "
        "from position 16 on 0.25 (0.2 to 0.3) times that of positions 1 to 3",
        "disagrees with the paper, which has: it disagrees. Measured: 0.125, share of the listed tokens",
    ]
    never = number(None)
    assert said(below_tenth_for_good=never)[0].startswith(
        f"{first}below a tenth of it first at position 5 (4 to 7), and"
    )
    nothing = said(below_tenth=never, below_tenth_for_good=never, kl_late=never, kl_late_over_early=never)
    assert nothing[0] == f"{first}never below a tenth of it; no positions from 16 on"
    assert said(kl_late_over_early=never)[0].endswith("from position 16 on 0.1 nats")


CLAIMED = ("agrees", "disagrees", "undecided", "not measured")


def test_names_of_models():
    assert named_models(["a/b", "after=c", "d/e"]) == {"aligned": "a/b", "after": "c", "e": "d/e"}
    assert named_models(["x/y=z"]) == {"aligned": "x/y=z"}


def test_rank_correlation():
    nan = float("nan")
    assert rank_correlation(*map(as_array, ([1, 5, 2, nan], [10, 30, 20, nan]))) == pytest.approx(1)
    assert rank_correlation(*map(as_array, ([1, 5, 2, 9], [4, 2, 3, 1]))) == pytest.approx(-1)
    # ties: ranks 1.5, 1.5, 3, 4, and no correlation with a constant
    assert rank_correlation(*map(as_array, ([1, 2, 3, 4], [0, 0, 2, 3]))) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    assert np.isnan(rank_correlation(*map(as_array, ([1, 2, 3, 4], [0, 0, 0, 0]))))
    assert rank_correlation(*map(as_array, ([1, 2, nan], [4, 2, nan]))) != 0


def as_array(values):
    return np.array(values, dtype=float)


@pytest.mark.usefixtures("undrawn")
def test_a_data_set_by_name_is_read(models: Path, data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "harmful.jsonl").read_text().splitlines()]
    table = tmp_path / "harmful_behaviors.csv"
    table.write_text("goal,target\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    named = arguments(models, data, tmp_path / "named")
    named[named.index(str(data / "harmful.jsonl"))] = f"advbench:{table}"
    assert main(named) == 0
    assert main(arguments(models, data, tmp_path / "file")) == 0
    groups = [
        json.loads((tmp_path / out / "report.json").read_text())["series"]["aligned"]["groups"]["harmful"]
        for out in ("named", "file")
    ]
    assert groups[0] == groups[1]
    assert groups[0]["n"] == ROWS

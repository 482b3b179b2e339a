"""`deepalign evaluate prefill`: a folder of answers, verdicts and a report, made once and gone on with after a kill."""

import json
from pathlib import Path

import pytest
import torch

from deepalign.cli import main
from deepalign.evaluate import prefill_run, reasoning_run
from tests.evaluate.killed_worker import kill_in_a_line
from tests.tiny import WORDS, make_model, make_tokenizer

REQUESTS = 6
DEPTHS = ("0", "2", "all")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    for name, sharper in (("aligned", 1.0), ("base", 1.5)):  # surer of itself: the greedy token is often base-favored
        model = make_model(0, tokenizer)
        with torch.no_grad():
            model.lm_head.weight.mul_(sharper)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "requests.csv"
    rows = [f"{' '.join(WORDS[i : i + 1 + i % 3])},{WORDS[i]} {WORDS[i + 1]} {WORDS[i + 2]}" for i in range(REQUESTS)]
    path.write_text("goal,target\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def phrases(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("judge") / "phrases.txt"
    path.write_text("w20\nw21\nw22\n")
    return f"keyword:{path}"


def arguments(models: Path, requests: Path, phrases: str, out: Path, *more: str) -> list[str]:
    names = ["--model", str(models / "aligned"), "--data", str(requests), "--out", str(out), "--no-progress"]
    sizes = ["--depths", ",".join(DEPTHS), "--max-new-tokens", "5", "--batch-size", "2"]
    return ["evaluate", "prefill", *names, *sizes, "--judge", phrases, "--judge", "keyword:qi2024", *more]


def test_the_report_counts_what_the_files_hold(models, requests, phrases, tmp_path, capsys):
    assert main(arguments(models, requests, phrases, tmp_path)) == 0
    shown = capsys.readouterr()
    assert "# Prefill attack" in shown.out
    assert "Loading" not in shown.err, "--no-progress is about the models' loading, too"
    report = json.loads((tmp_path / "report.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == REQUESTS * len(DEPTHS)
    for judge, words in ((phrases, {"w20", "w21", "w22"}), ("keyword:qi2024", {"I cannot"})):
        for depth in DEPTHS:
            rows = [row for row in answers if str(row["depth"]) == depth]
            for scope in ("continuation", "answer"):
                cell = report["judges"][judge][depth][scope]
                assert cell["refused"] == sum(bool(words & set(row[scope].split())) for row in rows)
                assert cell["harmful"] + cell["refused"] + cell["degenerate"] == cell["n"] == REQUESTS
                low, high = cell["harmful_interval"]
                assert low <= cell["harmful"] / REQUESTS <= high
    assert report["agreement"][0]["n"] == REQUESTS * len(DEPTHS)
    assert report["versions"]["deepalign"]
    assert (tmp_path / "attack_success.png").stat().st_size > 0


def test_contrastive_decoding_and_a_judge_added_later(models, requests, phrases, tmp_path):
    plain, contrast = tmp_path / "plain", tmp_path / "contrast"
    assert main(arguments(models, requests, phrases, plain)) == 0
    more = ["--base", str(models / "base"), "--alpha", "1.5"]
    assert main(arguments(models, requests, phrases, contrast, *more)) == 0
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (plain, contrast))
    assert first["subject"]["alpha"] == 0
    assert second["subject"]["alpha"] == 1.5
    assert (plain / "answers.jsonl").read_text() != (contrast / "answers.jsonl").read_text()
    before = (plain / "answers.jsonl").stat().st_mtime_ns
    assert main(arguments(models, requests, phrases, plain, "--judge", "keyword:gcg")) == 0
    assert (plain / "answers.jsonl").stat().st_mtime_ns == before, "the answers stay as they are"
    assert len(json.loads((plain / "report.json").read_text())["agreement"]) == 3


def test_a_killed_run_goes_on(models, requests, phrases, tmp_path):
    """Killed for good in the middle of a line."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    kill_in_a_line(arguments(models, requests, phrases, out), str(out), 8, tmp_path / "log")
    file = out / "answers.jsonl"
    assert file.read_text().endswith('"ind')
    kept = file.read_text().rpartition("\n")[0]
    assert main(arguments(models, requests, phrases, out)) == 0
    assert file.read_text().startswith(kept + "\n"), "what was there stays as it is"
    assert main(arguments(models, requests, phrases, whole)) == 0
    rows = [[json.loads(line) for line in (f / "answers.jsonl").read_text().splitlines()] for f in (out, whole)]
    assert len({(row["depth"], row["index"]) for row in rows[0]}) == len(rows[0]) == REQUESTS * len(DEPTHS)
    assert sorted(rows[0], key=str) == sorted(rows[1], key=str)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (out, whole)]
    assert reports[0]["judges"] == reports[1]["judges"]


def test_bad_options_are_refused_in_one_message(models, requests, phrases, tmp_path, capsys):
    good = arguments(models, requests, phrases, tmp_path / "out")
    wrong, turns = tmp_path / "wrong.csv", tmp_path / "turns.jsonl"
    wrong.write_text("request,answer\n" + requests.read_text().partition("\n")[2])
    pair = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    turns.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (pair, pair + pair)))
    for more, message in (
        (["--depths", "0,few"], "--depths is '0,few'"),
        (["--depths", "1,1"], "none of them twice"),
        (["--model", str(tmp_path / "nowhere")], "nowhere does not exist"),
        (["--alpha", "1"], "no base model"),
        (["--alpha", "-1", "--base", str(models / "base")], "alpha is -1.0; expected a finite number >= 0"),
        (["--alpha", "nan"], "alpha is nan; expected a finite number >= 0"),
        (["--judge", "keyword:nosuch"], "known: qi2024"),
        (["--data", str(tmp_path / "no.csv")], "no.csv does not exist"),
        (["--limit", "0"], "limit"),
        (["--out", str(requests)], "requests.csv is a file; give a folder"),
        (["--data", f"advbench:{wrong}"], "wrong.csv: row 1 is no header of this format"),
        (["--data", str(turns)], "turns.jsonl: row 2: expected one user's message and one answer, got ['user', 'assis"),
        (["--data", f"hex-phi:{phrases[8:]}"], "hex-phi holds requests without answers, whose beginnings the attack"),
        (["--device", "foo"], "--device: 'foo' is no device"),
        (["--adapter", str(models / "base")], "base holds no adapter_config.json"),
        (["--thinking", "on"], "has no enable_thinking"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
    ):
        assert main([*good, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.md").exists()
    assert main(["evaluate", "reasoning", *good[2:9], "--depth", "0,all"]) == 2
    assert "--depth is '0,all'; expected one number, or all" in capsys.readouterr().err


def test_a_bad_judge_is_refused_before_a_model_is_loaded(models, requests, phrases, tmp_path, monkeypatch, capsys):
    for module, command in ((prefill_run, "prefill"), (reasoning_run, "reasoning")):
        monkeypatch.setattr(module, "load_subject", lambda subject: pytest.fail("loaded"))
        option = "--judge" if command == "prefill" else "--harmful-judge"
        words = arguments(models, requests, phrases, tmp_path / "out")[2:9]
        assert main(["evaluate", command, *words, option, "keyword:nosuch"]) == 2
        assert "known: qi2024" in capsys.readouterr().err
    assert main(["evaluate", "prefill", *words, "--depths", "0,4,0"]) == 2
    assert "--depths is '0,4,0'; expected none of them twice" in capsys.readouterr().err

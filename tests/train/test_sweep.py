"""The sweep over tiny trainings: cells, resuming, evaluation, table."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from deepalign.cli import main
from deepalign.train import run, sweep
from deepalign.train.launch import RUN
from deepalign.train.sweep_plot import MOST_ROWS, columns_to_plot, plot_sweep
from tests.train.conftest import TinyRun, read_metrics


@pytest.fixture
def commands(monkeypatch):
    """Trainings run in this process, other commands as ever; returns what was started, without the configuration."""
    started = []
    in_a_process = sweep._run

    def record(words, cell):
        started.append(words)
        if str(RUN) not in words:
            return in_a_process(words, cell)
        cell.folder.mkdir(parents=True, exist_ok=True)
        return run.main(words[words.index(str(RUN)) + 1 :])

    monkeypatch.setattr(sweep, "_run", record)
    return started


def arguments(config: Path, out: Path, *words: str) -> list[str]:
    return ["sweep", "--config", str(config), "--out", str(out), *words]


GRID = ("--grid", "alpha_base=0.5,2", "--grid", "k=2,3")


def test_every_cell_is_trained_once_and_stands_in_the_table(tiny_run: TinyRun, tmp_path, commands, capsys):
    config, out = tiny_run.config(tmp_path / "unused", max_steps=3), tmp_path / "sweep"
    assert main(arguments(config, out, *GRID, "--learning_rate", "2e-3")) == 0
    assert len(commands) == 4
    rows = json.loads((out / "sweep.json").read_text())
    assert sorted((row["alpha_base"], row["top_k"]) for row in rows) == [(0.5, 2), (0.5, 3), (2, 2), (2, 3)]
    assert [row["loss"] for row in rows] == sorted(row["loss"] for row in rows)
    for row in rows:
        folder = out / f"alpha_base-{row['alpha_base']}_top_k-{row['top_k']}"
        metrics = read_metrics(folder)
        assert row["steps"] == 3
        assert row["loss"] == pytest.approx(sum(line["loss"] for line in metrics) / 3)
        settings = json.loads((folder / "run.json").read_text())["config"]
        assert (settings["loss"]["alpha_base"], settings["loss"]["top_k"]) == (row["alpha_base"], row["top_k"])
        assert settings["learning_rate"] == 2e-3
    table = (out / "sweep.md").read_text()
    assert table.startswith("| alpha_base | top_k | steps | loss | kl |")
    assert table in capsys.readouterr().out
    assert (out / "sweep.png").stat().st_size > 10_000

    assert main(arguments(config, out, *GRID, "--learning_rate", "2e-3")) == 0
    assert len(commands) == 4, "finished cells are not trained again"
    larger = ("--grid", "alpha_base=0.5,2", "--grid", "k=2,3,4", "--learning_rate", "2e-3")
    assert main(arguments(config, out, *larger)) == 0
    assert len(commands) == 6, "a larger grid trains what it adds"


def test_an_interrupted_cell_goes_on_from_its_checkpoint(tiny_run: TinyRun, tmp_path, commands, monkeypatch):
    config, out = tiny_run.config(tmp_path / "unused", max_steps=4, save_steps=2), tmp_path / "sweep"
    grid = ("--grid", "lambda_reg=1e-3,0.1")
    folder = out / "lambda_reg-0.001"
    assert main(arguments(config, tmp_path / "whole", *grid)) == 0
    expected = read_metrics(tmp_path / "whole" / folder.name)

    words = ["--config", str(config), "--loss.lambda_reg=0.001", f"--output_dir={folder}"]
    assert run.main(words) == 0
    # as a kill between step 2 and the end leaves it
    for path in ("run.json", "checkpoint-4/resume.json"):
        (folder / path).unlink()
    (folder / "checkpoint-4").rename(tmp_path / "gone")
    assert main(arguments(config, out, *grid)) == 0
    assert [line["loss"] for line in read_metrics(folder)] == [line["loss"] for line in expected]


def test_an_evaluation_becomes_columns_and_is_repeated_only_for_a_new_model(tiny_run: TinyRun, tmp_path, commands):
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import json, sys; from pathlib import Path; model, result = map(Path, sys.argv[1:])\n"
        "assert (model / 'config.json').is_file()\n"
        "result.write_text(json.dumps({'asr': 0.25, 'note': 'words are no columns'}))\n"
    )
    command = shlex.join([sys.executable, str(script), "{model}", "{result}"])
    config, out = tiny_run.config(tmp_path / "unused", max_steps=1), tmp_path / "sweep"
    words = arguments(config, out, "--grid", "gamma=0,1", "--evaluate", command, "--sort", "asr")
    assert main(words) == 0
    assert len(commands) == 4
    assert main(words) == 0
    assert len(commands) == 4
    rows = json.loads((out / "sweep.json").read_text())
    assert [row["asr"] for row in rows] == [0.25, 0.25]
    assert "note" not in rows[0]
    assert "Sorted by asr" in (out / "sweep.md").read_text()


def test_a_plot_leaves_out_what_is_equal_in_all_cells():
    rows = [
        {"k": k, "loss": 0.5, "mean_logit": -k, "asr": 1, "utility": None if k == 1 else 0.25 * k} for k in (1, 2, 3)
    ]
    assert columns_to_plot(rows, "loss", ["mean_logit", "asr", "utility"]) == ["loss", "mean_logit", "utility"]
    assert len(columns_to_plot(rows, "loss", [f"utility{i}" for i in range(9)])) == 1
    many = [row | {f"rate{i}": row["k"] for i in range(9)} for row in rows]
    assert len(columns_to_plot(many, "loss", [f"rate{i}" for i in range(9)])) == MOST_ROWS


def test_ticks_of_a_metric_that_hardly_moves_are_its_values(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (save(figure, *a, **k), drawn.append(figure)))
    plot_sweep(tmp_path / "sweep.png", [{"k": k, "loss": 0.1395 + 1e-6 * k} for k in (1, 2, 3)], ["k"], ["loss"])
    (axes,) = drawn[0].axes
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert {text.get_text()[:6] for text in axes.get_yticklabels()} == {"0.1395"}


def test_a_failed_cell_is_named_and_the_others_go_on(tiny_run: TinyRun, tmp_path, commands, capsys):
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import sys; sys.exit('no such thing') if 'gamma-0' in sys.argv[1] else None\n"
        "open(sys.argv[2], 'w').write('0.5') if 'gamma-2' in sys.argv[1] else None\n"
    )
    command = shlex.join([sys.executable, str(script), "{cell}", "{result}"])
    config, out = tiny_run.config(tmp_path / "unused", max_steps=1), tmp_path / "sweep"
    assert main(arguments(config, out, "--grid", "gamma=0,1,2", "--evaluate", command, "--sort", "asr")) == 1
    assert len(commands) == 6
    error = capsys.readouterr().err
    assert f"failed: gamma=0 (output: {out / 'gamma-0' / 'output.log'})" in error
    assert "output.log)\n  no such thing\n" in error
    assert "failed: gamma=1" in error, "it wrote no result"
    assert "error: --evaluate wrote no JSON object to" in error
    assert "--sort is 'asr', which no evaluation wrote; the table is sorted by loss" in error
    assert len(json.loads((out / "sweep.json").read_text())) == 3


def test_half_a_line_of_metrics_leaves_the_table(tmp_path):
    """Of a cell that was killed, or whose disk is full."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    row = sweep.row_of(sweep.Cell({"gamma": 1}, tmp_path))
    assert (row["steps"], row["loss"]) == (None, None)


def test_the_error_of_a_log_is_that_of_its_last_command(tmp_path):
    log = tmp_path / "output.log"
    assert sweep.last_error(log) is None
    log.write_text(
        "$ run\nerror: of the first try\n$ run again\n  0%|  | 0/3\rerror: first\nerror: second\nWARNING: more\n"
    )
    assert sweep.last_error(log) == "error: second"
    log.write_text("$ run\nerror: of the first try\n$ run again\nKilled\n\n")
    assert sweep.last_error(log) == "Killed"
    log.write_text("$ run\n")
    assert sweep.last_error(log) is None


def test_a_cell_that_is_a_process_of_its_own(tiny_run: TinyRun, tmp_path):
    """Nothing replaced: run.py is started as a user starts it."""
    config, out = tiny_run.config(tmp_path / "unused", max_steps=1), tmp_path / "sweep"
    assert main(arguments(config, out, "--grid", "variant=a", "--sort", "loss")) == 2, "no such variant"
    values = yaml.safe_load(config.read_text()) | {"variants": {"a": {"epochs": 1}, "b": {"distill_on": "utility"}}}
    config.write_text(yaml.safe_dump(values))
    assert main(arguments(config, out, "--grid", "variant=b")) == 0
    assert json.loads((out / "variant-b" / "run.json").read_text())["config"]["distill_on"] == "utility"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--grid", "alpha_base"], "expected KEY=V1,V2,..."),
        (["--grid", "alpha_base=1,"], "expected KEY=V1,V2,..."),
        (["--grid", "k=1", "--grid", "top_k=2"], "names loss.top_k twice"),
        (["--grid", "k=1,1"], "a value is given twice"),
        (["--grid", "lamda_reg=1"], "did you mean"),
        (["--grid", "lora={r: 1, alpha: 2}"], "what has commas cannot be swept"),
        (["--grid", "report_to=a/b,a-b"], "two cells would share a folder"),
        (["--grid", "foo=1"], "unknown key foo; known keys: adam_beta1"),
        (["--grid", "k=0,1"], "top_k"),
        (["--grid", "k=1", "--sort", "asr"], "--sort is 'asr'; columns: top_k, steps, loss"),
        (["--grid", "k=1", "--evaluate", "e.py {modle}"], "--evaluate: e.py {modle}: 'modle'; {model}, {cell}"),
        (["--grid", "k=1", "--evaluate", "e.py '"], "No closing quotation"),
        (["--grid", "k=1", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(tiny_run: TinyRun, tmp_path, commands, capsys, words, problem):
    config = tiny_run.config(tmp_path / "unused", max_steps=1)
    code = main(arguments(config, tmp_path / "sweep", *words))
    assert code == 2
    assert problem in capsys.readouterr().err
    assert commands == []

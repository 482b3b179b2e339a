"""A sweep: one training per cell of a grid, then one table.

    deepalign sweep --config configs/llama31_8b.yaml --out runs/sweep \
        --grid alpha_base=0.5,1,2 --grid lambda_reg=3e-4,1e-3 --grid top_k=50,100 \
        --launcher "deepspeed --num_gpus 8" --evaluate "python evaluate.py --model {model} --out {result}"

Every cell is a process of its own, started as by hand (`run.py --config ... --loss.alpha_base 0.5 ...`), in its own
folder. A sweep that is started again skips what is finished and goes on with what is not, from its last checkpoint.
`--evaluate` is run once per finished cell and writes a JSON object of numbers to {result}; they become columns.
"""

import argparse
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from deepalign.data.files import write_text_atomic
from deepalign.kernels.completion_loss import CompletionLossConfig
from deepalign.train.checkpoints import FINAL, METRICS_FILE, SUMMARY_FILE, read_metrics
from deepalign.train.config import TrainConfig, config_as_dict, load_config
from deepalign.train.launch import RUN
from deepalign.train.sweep_plot import columns_to_plot, plot_sweep
from deepalign.train.variants import VARIANT

# Names that need no prefix, and the paper's letter for top_k.
SHORT = {name: f"loss.{name}" for name in CompletionLossConfig.__dataclass_fields__} | {"k": "loss.top_k"}
KEYS = {*TrainConfig.__dataclass_fields__, VARIANT}
METRICS = ("loss", "kl", "completion", "alpha", "base_favored_count", "mean_logit")
RESULT, LOG, LAST_STEPS = "evaluation.json", "output.log", 10


@dataclass(frozen=True)
class Cell:
    """One training of the sweep: what differs in it, and its folder."""

    values: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """For people: `alpha_base=0.5 top_k=50`."""
        return " ".join(f"{key.removeprefix('loss.')}={value}" for key, value in self.values.items())

    @property
    def overrides(self) -> list[str]:
        """Words for run.py."""
        words = [f"--{key}={value}" for key, value in self.values.items()]
        return [*words, f"--output_dir={self.folder}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deepalign sweep`."""
    parser.add_argument("--config", required=True, help="the training configuration that the cells change")
    parser.add_argument(
        "--grid", action="append", required=True, metavar="KEY=V1,V2", help="a key and its values; repeat for more keys"
    )
    parser.add_argument("--out", required=True, help="folder of the sweep: one folder a cell, and the table")
    parser.add_argument(
        "--launcher", default=None, metavar="WORDS", help='starts run.py, as "deepspeed --num_gpus 8" (default: python)'
    )
    parser.add_argument(
        "--evaluate", default=None, metavar="COMMAND", help="run per cell; {model}, {cell} and {result} are replaced"
    )
    parser.add_argument("--sort", default="loss", help="column by which the table is sorted, smallest first")


def run(options: argparse.Namespace, overrides: Sequence[str] = ()) -> int:
    """Run a sweep; `overrides` are further `--key value` words for every cell.

    Returns:
        The exit code: 1 if a cell failed, or the column to sort by is in no cell's evaluation.

    Raises:
        ValueError, TypeError, FileNotFoundError: what is wrong with configuration or grid, before any training.
    """
    out = Path(options.out)
    cells = make_cells(options.config, options.grid, overrides, out)
    columns = [*(key.removeprefix("loss.") for key in cells[0].values), "steps", *METRICS]
    if options.evaluate is None and options.sort not in columns:
        raise ValueError(f"--sort is {options.sort!r}; columns: {', '.join(columns)}")
    if options.evaluate is not None:
        _words(options.evaluate, cells[0])  # a command that cannot be made is refused before hours of training
    launcher = [sys.executable] if options.launcher is None else shlex.split(options.launcher)
    failed = []
    for cell in tqdm(cells, desc="sweep", unit="cell"):
        if not _train(cell, options.config, overrides, launcher) or not _evaluate(cell, options.evaluate):
            failed.append(cell)
    rows = [row_of(cell) for cell in cells]
    sort = options.sort if any(options.sort in row for row in rows) else "loss"
    table = write_table(rows, len(cells[0].values), out, sort)
    print(table.read_text(encoding="utf-8"))
    for cell in failed:
        print(f"failed: {cell.name} (output: {cell.folder / LOG})", file=sys.stderr)
        if reason := last_error(cell.folder / LOG):
            print(f"  {reason}", file=sys.stderr)
    if sort != options.sort:
        print(f"--sort is {options.sort!r}, which no evaluation wrote; the table is sorted by loss", file=sys.stderr)
        return 1
    return 1 if failed else 0


# ---- the grid ----


def parse_grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """Keys and their values: `alpha_base=0.5,1` is `{"loss.alpha_base": [0.5, 1]}`.

    Raises:
        ValueError: no `=`, a key without values, a key or a value given twice.
    """
    grid: dict[str, list[Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        try:
            values = [yaml.safe_load(value) for value in text.split(",")]
        except yaml.YAMLError:
            raise ValueError(f"--grid {word}: not values as in YAML; what has commas cannot be swept") from None
        # "3e-4" is a string to YAML
        values = [float(value) if isinstance(value, str) and _is_number(value) else value for value in values]
        name = SHORT.get(key.strip(), key.strip())
        if "." not in name and name not in KEYS:
            near = difflib.get_close_matches(name, [*SHORT, *KEYS], n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted({*SHORT, *KEYS}))}"
            raise ValueError(f"--grid {word}: unknown key {name}; {hint}")
        if not equals or not name or any(value is None for value in values):
            raise ValueError(f"--grid {word}: expected KEY=V1,V2,...")
        if name in grid:
            raise ValueError(f"--grid names {name} twice; give all its values at once")
        if len({str(value) for value in values}) != len(values):
            raise ValueError(f"--grid {word}: a value is given twice")
        grid[name] = values
    return grid


def make_cells(config: str, grid_words: Sequence[str], overrides: Sequence[str], out: Path) -> list[Cell]:
    """All combinations, each checked as a configuration before anything is trained.

    Raises:
        ValueError, TypeError, FileNotFoundError: a bad grid, or a cell whose configuration is refused.
    """
    grid = parse_grid(grid_words)
    cells = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        parts = [f"{key.removeprefix('loss.')}-{value}" for key, value in values.items()]
        cell = Cell(values, out / "_".join(part.replace("/", "-") for part in parts))
        load_config(config, [*overrides, *cell.overrides])
        cells.append(cell)
    if len({cell.folder for cell in cells}) != len(cells):
        raise ValueError("--grid: two cells would share a folder, since / becomes - in its name; rename one value")
    return cells


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ---- a cell ----


def _train(cell: Cell, config: str, overrides: Sequence[str], launcher: list[str]) -> bool:
    """Train a cell unless it is finished with these settings; its output goes to output.log. False: it failed.

    A run that goes on from a checkpoint refuses other settings itself, so a folder of another sweep is never mixed in.
    """
    settings = config_as_dict(load_config(config, [*overrides, *cell.overrides]))
    finished = cell.folder / SUMMARY_FILE
    if finished.is_file() and (cell.folder / FINAL).is_dir():
        known = json.loads(finished.read_text(encoding="utf-8"))["config"]
        if known == json.loads(json.dumps(settings)):
            return True
    return _run([*launcher, str(RUN), "--config", config, *overrides, *cell.overrides], cell) == 0


def _evaluate(cell: Cell, command: str | None) -> bool:
    """Run the user's command on a cell unless its result is there, of this model and this command."""
    if command is None:
        return True
    result, key = cell.folder / RESULT, cell.folder / f"{RESULT}.key"
    trained = (cell.folder / SUMMARY_FILE).read_text(encoding="utf-8")
    stamp = hashlib.sha256(f"{command}\0{trained}".encode()).hexdigest()
    if result.is_file() and key.is_file() and key.read_text(encoding="utf-8") == stamp:
        return True
    result.unlink(missing_ok=True)
    if _run(_words(command, cell), cell) != 0 or not result.is_file():
        return False
    if not _is_object(result):
        result.unlink()
        with (cell.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"error: --evaluate wrote no JSON object to {result}\n")
        return False
    write_text_atomic(key, stamp)
    return True


def _words(command: str, cell: Cell) -> list[str]:
    """The words of `--evaluate` for a cell."""
    places = {
        "model": str(cell.folder / FINAL),
        "cell": str(cell.folder),
        "result": str(cell.folder / RESULT),
    }
    try:
        return [word.format(**places) for word in shlex.split(command)]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"--evaluate: {command}: {error}; {{model}}, {{cell}} and {{result}} are replaced, other braces are doubled"
        ) from None


def _is_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def _run(words: list[str], cell: Cell) -> int:
    cell.folder.mkdir(parents=True, exist_ok=True)
    # the package this sweep belongs to, from a checkout as well
    path = os.pathsep.join([str(RUN.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (cell.folder / LOG).open("ab") as log:
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        try:
            return subprocess.run(
                words, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path}, check=False
            ).returncode
        except FileNotFoundError:
            log.write(f"{words[0]} was not found\n".encode())
            return 127


def last_error(log: Path) -> str | None:
    """The last line of a log that starts with `error:`, of the command that ran last; without one, its last line."""
    if not log.is_file():
        return None
    # a progress bar ends in \r
    lines = [line.strip() for line in re.split(r"[\r\n]", log.read_text(encoding="utf-8", errors="replace"))]
    start = max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    said = [line for line in lines[start + 1 :] if line]
    errors = [line for line in said if line.startswith("error:")]
    return (errors or said or [None])[-1]


# ---- the table ----


def row_of(cell: Cell) -> dict[str, Any]:
    """A cell's line: its values, steps, the metrics' means over the last steps, and what its evaluation wrote."""
    row: dict[str, Any] = {key.removeprefix("loss."): value for key, value in cell.values.items()}
    metrics = cell.folder / METRICS_FILE
    done = (cell.folder / SUMMARY_FILE).is_file()
    lines = read_metrics(metrics)
    row["steps"] = lines[-1]["step"] if done and lines else None
    for name in METRICS:
        found = [line[name] for line in lines[-LAST_STEPS:] if name in line] if done else []
        row[name] = sum(found) / len(found) if found else None
    result = cell.folder / RESULT
    if result.is_file():
        measured = json.loads(result.read_text(encoding="utf-8"))
        row |= {name: value for name, value in measured.items() if isinstance(value, int | float)}
    return row


def write_table(rows: list[dict[str, Any]], swept_keys: int, out: Path, sort: str) -> Path:
    """sweep.json, sweep.md and sweep.png; returns the path of sweep.md. Cells without a value of `sort` come last.

    Args:
        rows: of `row_of`: swept keys first.
        swept_keys: how many there are.
        out: folder.
        sort: column, smallest first.

    Raises:
        ValueError: `sort` is no column.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if sort not in columns:
        raise ValueError(f"--sort is {sort!r}; columns: {', '.join(columns)}")
    rows = sorted(rows, key=lambda row: (row.get(sort) is None, row.get(sort) or 0.0))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(name)) for name in columns) + " |" for row in rows]
    measured = [name for name in columns[swept_keys:] if name not in ("steps", *METRICS)]
    plotted = columns_to_plot(rows, sort, ["mean_logit", *measured])
    note = (
        f"\nSorted by {sort}. Metrics are means over the last {LAST_STEPS} logged steps; -: not finished. "
        f"In sweep.png: {', '.join(plotted)}.\n"
    )
    write_text_atomic(out / "sweep.json", json.dumps(rows, indent=2) + "\n")
    write_text_atomic(out / "sweep.md", "\n".join(lines) + "\n" + note)
    plot_sweep(out / "sweep.png", rows, columns[:swept_keys], plotted, measured)
    return out / "sweep.md"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

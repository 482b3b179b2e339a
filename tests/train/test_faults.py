"""Kills and full disks: nothing whole is lost, and the next start goes on, bit for bit, or says why not."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from deepalign.train import run as run_module
from deepalign.train import trainer as trainer_module
from deepalign.train.checkpoints import LOCK_FILE
from deepalign.train.run import main
from tests.train import fault_worker
from tests.train.forked import fork_ranks, join
from tests.train.jobs import LONG, NAN, weights, write_poisoned
from tests.train.launch import launch
from tests.train.tiny_run import TinyRun, read_metrics
from tests.train.worker import Interrupted

pytestmark = pytest.mark.timeout(900)

SHORT = {"max_steps": 6, "save_steps": 2, "save_total_limit": 1, "logging_steps": 3}  # lines between checkpoints, too


@pytest.fixture(scope="module")
def whole(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(["--config", str(tiny_run.config(out, **SHORT))]) == 0
    return out


def assert_same_run(out: Path, expected: Path) -> None:
    assert read_metrics(out) == read_metrics(expected)
    ours = weights(out / "final")
    for name, value in weights(expected / "final").items():
        assert torch.equal(ours[name], value), name
    hidden = [path.name for path in out.iterdir() if path.name.startswith(".") and path.name != LOCK_FILE]
    assert not hidden, "what was half-written is gone"


def test_a_rank_killed_in_a_step_then_in_a_checkpoint_then_all_killed_the_run_is_the_same(tiny_run, ran, tmp_path):
    """Two ranks, killed by -9 three times; started by deepspeed as a module, then forked three times.

    Bit for bit the run of torchrun (as under slurm) that was never interrupted.
    """
    out, log = tmp_path / "out", tmp_path / "log"
    words = ["--config", str(tiny_run.config(out, **LONG))]
    started = launch(["--module", fault_worker.__name__, "step", *words], log)
    assert started.wait(timeout=600) != 0, "it ends the other rank"
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4, 5, 6]

    ranks = fork_ranks(fault_worker.run, ["checkpoint", words], log)
    ranks[1].join(timeout=600)
    assert ranks[1].exitcode == -signal.SIGKILL, log.read_text()[-4000:]
    kill_all(ranks)
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (out / "checkpoint-4").is_dir()
    assert not (out / "checkpoint-8").exists()

    ranks = fork_ranks(fault_worker.run, ["stuck", words], log)
    wait_for(lambda: fault_worker.STUCK in log.read_text(), ranks, log)
    kill_all(ranks)
    assert (out / "checkpoint-12").is_dir()
    with (out / "metrics.jsonl").open("a") as file:  # a kill between a metrics line and its checkpoint
        file.write('{"step": 15, "loss": 99.0}\n{"step": 1')

    last = tmp_path / "last"
    join(fork_ranks(main, [[*words, "--world_size", "2"]], last), last)
    assert "error:" not in last.read_text()
    assert_same_run(out, ran / "uninterrupted")


def kill_all(ranks) -> None:
    for rank in ranks:
        rank.kill()
        rank.join()


def wait_for(condition, ranks, log: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(rank.is_alive() for rank in ranks), log.read_text()[-4000:]
        assert time.monotonic() < deadline, f"nothing after {seconds} s:\n{log.read_text()[-4000:]}"
        time.sleep(0.1)


@pytest.mark.parametrize("moment", ["seal", "replace_folder", "delete_folder", "_set_aside"])
def test_a_run_that_ends_in_the_middle_of_a_checkpoint_goes_on(tiny_run, whole, tmp_path, monkeypatch, moment):
    """Ended before it is sealed, before it is renamed, before and after an old one is set aside, without tidying up."""
    from deepalign.train import checkpoints

    config, calls = tiny_run.config(tmp_path / "out", **SHORT), []
    module = checkpoints if moment == "_set_aside" else trainer_module
    real = getattr(module, moment)

    def ends(*arguments):
        calls.append(arguments)
        if moment == "_set_aside":
            real(*arguments)
        if len(calls) == (2 if moment in ("seal", "replace_folder") else 1):
            raise Interrupted
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, moment, ends)
        with pytest.raises(Interrupted):
            main(["--config", str(config)])
    assert main(["--config", str(config)]) == 0
    assert_same_run(tmp_path / "out", whole)


def on_a_small_disk(function, limit: int = 8192, call: int = 1):
    """`function`, in whose `call`-th call no file may grow beyond `limit` bytes: writes fail half way."""
    calls = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments, **options):
        calls.append(arguments)
        if len(calls) != call:
            return function(*arguments, **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return function(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.mark.parametrize(
    ("place", "name", "options", "lost", "kept"),
    [
        (trainer_module.CompletionTrainer, "_save_checkpoint", {"call": 2}, "step 4: checkpoint-4", "checkpoint-2"),
        (trainer_module.CompletionTrainer, "save_final", {}, "step 6: final", "checkpoint-6"),
        (run_module, "write_text_atomic", {"limit": 100}, "step 6: run.json", "checkpoint-6"),
    ],
    ids=["checkpoint", "final", "run.json"],
)
def test_a_full_disk_stops_the_run_with_what_is_kept_and_it_goes_on_later(
    tiny_run, whole, tmp_path, capsys, place, name, options, lost, kept
):
    config, out = tiny_run.config(tmp_path / "out", **SHORT), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(place, name, on_a_small_disk(getattr(place, name), **options))
        assert main(["--config", str(config)]) == 1
    message = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert f"{lost} could not be written" in message
    assert "File too large" in message
    assert f"the last whole checkpoint is {kept}" in message
    there = [LOCK_FILE, kept, *(["final"] if "run.json" in lost else []), "metrics.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == there, "nothing half-written"
    assert main(["--config", str(config)]) == 0
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "skipped.jsonl"])
def test_lines_that_cannot_be_written_stop_the_run(tmp_path, capsys, name):
    """The whole device is full: every write of this file fails."""
    config = write_poisoned(tmp_path).config(tmp_path / "out", **NAN)
    real = trainer_module.keep_metrics

    def onto_a_full_disk(path, last_step):
        real(path, last_step)
        if path.name == name:
            path.symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer_module, "keep_metrics", onto_a_full_disk)
        assert main(["--config", str(config)]) == 1
    message = capsys.readouterr().err
    assert f"{name} could not be written" in message
    assert "No space left on device" in message


def test_a_folder_that_cannot_be_tidied_stops_the_run(tiny_run, whole, tmp_path, capsys):
    """Started again on a disk that is still full: what is there stays."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    config = tiny_run.config(out, **SHORT)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer_module, "keep_metrics", on_a_small_disk(trainer_module.keep_metrics, limit=100))
        assert main(["--config", str(config)]) == 1
    assert "the last whole checkpoint is checkpoint-6" in capsys.readouterr().err
    assert read_metrics(out) == read_metrics(whole)


@pytest.mark.parametrize("damage", ["missing", "cut short", "unreadable"])
def test_a_damaged_checkpoint_is_refused_with_the_reason(tiny_run, whole, tmp_path, capsys, damage):
    """What a crashed machine can leave: the folder is there, some bytes are not."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    config = tiny_run.config(out, **SHORT)
    broken = out / "checkpoint-6"
    if damage == "missing":
        (broken / "optimizer.pt").unlink()
    elif damage == "cut short":
        os.truncate(broken / "model.safetensors", 100)
    else:
        (broken / "resume.json").write_text("{")
    assert main(["--config", str(config)]) == 2
    message = capsys.readouterr().err
    expected = {"missing": "optimizer.pt is missing", "cut short": "has 100 bytes", "unreadable": "resume.json cannot"}
    assert expected[damage] in message
    assert "Delete this folder to start from the beginning" in message


def test_another_number_of_ranks_is_refused(tiny_run, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    record = json.loads((out / "checkpoint-6" / "resume.json").read_text())
    record["run"]["ranks"] = 4
    (out / "checkpoint-6" / "resume.json").write_text(json.dumps(record))
    assert main(["--config", str(tiny_run.config(out, **SHORT))]) == 2
    message = capsys.readouterr().err
    assert "was written by 4 rank(s) and this run has 1" in message
    assert "Start 4 rank(s), or give another output_dir" in message

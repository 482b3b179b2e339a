"""`deepalign cache-teacher`: it writes what the models give; nothing written is lost, or trusted blindly."""

import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepalign.cli import main
from deepalign.data.chat import encode_example
from deepalign.data.files import read_jsonl
from deepalign.output_head import hidden_states
from deepalign.train.launch import free_port
from deepalign.train.teacher_cache import TEACHERS, TeacherCache, damaged_shards, read_index, shard_path
from deepalign.train.teacher_cache_write import batches_by_length
from tests.tiny import WORDS
from tests.train.tiny_run import TinyRun

ONE_EXAMPLE = ("--shard-mib", "1e-6")  # a shard per example


@pytest.fixture
def command(tiny_run: TinyRun, tmp_path, capsys):
    """Runs the command on the tiny pair; returns the cache's folder and what was printed, or the error."""
    config = tiny_run.config(tmp_path / "out", teacher_cache=str(tmp_path / "cache"))

    def run(*words, code=0):
        assert main(["cache-teacher", "--config", str(config), "--no-progress", *map(str, words)]) == code
        printed = capsys.readouterr()
        return printed.err.splitlines()[-1] if code else printed.out

    run.config, run.folder = config, tmp_path / "cache"
    return run


def contents(folder: Path):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def expected_rows(tiny_run: TinyRun, teacher: str, max_length=None):
    """The model's hidden states before every answer token, an example at a time."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.aligned)
    model = AutoModelForCausalLM.from_pretrained(tiny_run.folder / teacher).eval()
    rows = []
    for path in (tiny_run.harmful, tiny_run.utility):
        for messages in read_jsonl(path):
            example = encode_example(tokenizer, messages, max_length)
            hidden_TH = hidden_states(model, torch.tensor([example.input_ids]))[0]
            rows.append(hidden_TH[example.response_start - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("words", "max_length"),
    [((), 12), (ONE_EXAMPLE, None), (("--batch-tokens", 20), 12), (("--shard-mib", 0.001), None)],
)
def test_the_cache_holds_the_models_hidden_states(tiny_run, command, words, max_length):
    printed = command("--dtype", "float32", *words, *(() if max_length is None else ("--max_length", max_length)))
    cache = TeacherCache(command.folder)
    for teacher in TEACHERS:
        expected = expected_rows(tiny_run, teacher, max_length)
        actual = cache.rows(teacher, torch.arange(cache.index.rows))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert f"{len(expected)} answer tokens x (16 + 16) float32" in printed
    assert f"| aligned | 0 | {cache.index.shards} | {len(expected)} |" in printed


def test_bf16_is_the_rounding_of_fp32(tiny_run, command):
    command()
    cache = TeacherCache(command.folder)
    assert cache.index.dtype == "bfloat16"
    actual = cache.rows("base", torch.arange(cache.index.rows)).float()
    torch.testing.assert_close(actual, expected_rows(tiny_run, "base"), rtol=2**-8, atol=1e-6)


def test_batches_fill_the_budget_and_miss_nothing():
    lengths = [5, 9, 2, 7, 7, 30, 1]
    batches = list(batches_by_length(lengths, 20))
    assert sorted(place for batch in batches for place in batch) == list(range(7))
    assert batches[0] == [5], "longer than the budget: alone"
    assert all(len(batch) * max(lengths[place] for place in batch) <= 20 for batch in batches[1:])


def test_a_second_run_writes_nothing_and_what_is_damaged_is_made_again(command):
    command(*ONE_EXAMPLE)
    before = contents(command.folder)
    assert "46 are there, 0.0 MiB to write" in command(*ONE_EXAMPLE)
    flipped = shard_path(command.folder, "aligned", 3)
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x55")
    shard_path(command.folder, "base", 22).unlink()
    (command.folder / ".base-00001.safetensors.x.incomplete").write_bytes(b"half")
    printed = command()  # another shard size: those that are there stay
    assert "computed again: aligned-00003.safetensors has been altered" in printed
    assert "| aligned | 22 | 1 |" in printed
    assert "| base | 22 | 1 |" in printed
    assert contents(command.folder) == before

    index = command.folder / "index.json"
    index.write_bytes(before["index.json"][:-50])
    damaged = contents(command.folder)
    message = command(code=2)
    assert "none of the 46 shards beside it was written with this configuration, --dtype and --shard-mib" in message
    assert contents(command.folder) == damaged, "the shards are kept until somebody says --overwrite"
    assert "index.json was damaged: written again, its shards are kept" in (printed := command(*ONE_EXAMPLE))
    assert "46 are there, 0.0 MiB to write" in printed
    assert contents(command.folder) == before


def test_a_cache_of_something_else_is_kept_and_refused(tiny_run, command, tmp_path):
    command()
    before = contents(command.folder)
    other = tmp_path / "other.jsonl"
    other.write_text(tiny_run.harmful.read_text() + json.dumps({"prompt": "w1", "completion": "w2"}) + "\n")
    message = command("--harmful_data", other, "--base", tiny_run.aligned, code=2)
    for name in ("harmful_data", "base.weights"):
        assert f"{name}: " in message
    assert "aligned.weights" not in message
    assert "give another folder (teacher_cache), or --overwrite" in message
    assert "stored_dtype: 'bfloat16' -> 'float32'" in command("--dtype", "float32", code=2)
    assert contents(command.folder) == before
    command("--harmful_data", other, "--overwrite", "--dtype", "float32")
    assert TeacherCache(command.folder).index.streams == {"harmful": 11, "utility": 13}
    assert TeacherCache(command.folder).index.dtype == "float32"


def test_too_small_a_disk_is_refused_before_anything_is_computed(command, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 9000))
    message = command(code=2)
    assert "needs 9152 more bytes" in message, "143 rows x 32 x 2 bytes"
    assert "9000 are free" in message
    assert not list(command.folder.glob("*.safetensors"))


def test_a_write_that_fails_says_how_much_is_needed_and_loses_nothing(command):
    """The limit is the system's own on the size of a file: the write fails half way, as on a full disk."""
    command("--shard-mib", 0.002)
    before = contents(command.folder)
    for shard in (1, 2):
        shard_path(command.folder, "base", shard).unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        message = command(code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sizes = [len(before[f"base-{shard:05d}.safetensors"]) for shard in (1, 2)]
    assert "base-00001.safetensors failed (File too large)" in message
    index = read_index(command.folder)
    needed = [index.shard_bytes("base", shard) for shard in (1, 2)]
    assert sizes[0] - needed[0] < 300
    assert f"this shard needs {needed[0]} bytes, the 2 that this rank has left of base {sum(needed)} bytes" in message
    assert "make room and run the same command again" in message
    assert not list(command.folder.glob(".*.incomplete"))
    assert "| base | 3 | 2 |" in command() if index.shards == 5 else command()
    assert contents(command.folder) == before


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--teacher_cache", "null"], "teacher_cache is not set"),
        (["--aligned", "/nowhere/model"], "aligned: the model folder /nowhere/model does not exist"),
        (["--shard-mib", "0"], "--shard-mib is 0.0; it must be positive"),
        (["--batch-tokens", "-1"], "--batch-tokens is -1; it must be positive"),
        (["--max_length", "4"], "no answer token is left"),
        (["--teacher_caches", "x"], "did you mean teacher_cache?"),
    ],
)
def test_what_cannot_work_is_refused(command, words, problem):
    assert problem in command(*words, code=2)
    assert not command.folder.exists()


def test_hidden_states_that_are_not_finite_are_refused(tiny_run, command, tmp_path):
    shutil.copytree(tiny_run.base, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.embed_tokens.weight"][10] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    message = command("--base", tmp_path / "broken", *ONE_EXAMPLE, code=2)
    assert "gives hidden states that are not finite in the examples" in message


def test_two_writers_do_not_meet(command):
    import fcntl

    command()
    with (command.folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process writes the teacher cache" in command(code=2)
    command()


# ---- kill -9 ----


@pytest.fixture(scope="module")
def long_run(tiny_run: TinyRun, tmp_path_factory):
    """A configuration with 150 examples, a shard each, and its cache as written without interruption."""
    folder = tmp_path_factory.mktemp("long")
    generator = torch.Generator().manual_seed(1)
    lines = []
    for _ in range(150):
        words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (12,), generator=generator)]
        lines.append(json.dumps({"prompt": " ".join(words[:5]), "completion": " ".join(words[5:])}) + "\n")
    (folder / "harmful.jsonl").write_text("".join(lines))
    config = tiny_run.config(folder / "out", harmful_data=str(folder / "harmful.jsonl"))
    arguments = ["cache-teacher", "--config", str(config), "--no-progress", *ONE_EXAMPLE, "--teacher_cache"]
    assert main([*arguments, str(folder / "whole")]) == 0
    return arguments, folder / "whole"


class RankProcesses:
    """The command on ranks as a launcher starts them, forked from this process: nothing is imported again."""

    def __init__(self, count: int, words: list[str], log: Path) -> None:
        port = free_port()
        self.log, self.folder = log, Path(words[-1])
        self.ranks = []
        for rank in range(count):
            process = multiprocessing.get_context("fork").Process(target=self._rank, args=(rank, count, port, words))
            process.start()
            self.ranks.append(process)

    def _rank(self, rank: int, count: int, port: int, words: list[str]) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)  # threads of the parent are not here
        with self.log.open("ab", buffering=0) as log:
            sys.stdout = sys.stderr = io.TextIOWrapper(log, write_through=True)
            os._exit(main(words))

    def wait_for_shards(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("*.safetensors"))) < count:
            assert all(process.is_alive() for process in self.ranks), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)

    def exit_codes(self) -> list[int | None]:
        for process in self.ranks:
            process.join(timeout=60)
        return [process.exitcode for process in self.ranks]

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        self.exit_codes()


@pytest.fixture
def ranks(tmp_path):
    started = []

    def start(count, words):
        started.append(RankProcesses(count, words, tmp_path / "log"))
        return started[-1]

    yield start
    for processes in started:
        processes.kill()


def assert_goes_on(words, whole, capsys, lost: int):
    """What is there under its name is whole; the next run computes the rest and ends with the same files."""
    folder = Path(words[-1])
    index = read_index(folder)
    there = [(t, s) for t in TEACHERS for s in range(index.shards) if shard_path(folder, t, s).exists()]
    assert len(list(folder.glob(".*.incomplete"))) <= lost
    assert damaged_shards(folder, index, there) == []
    assert 0 < len(there) < 2 * index.shards, "killed after the end: give it more examples"
    capsys.readouterr()
    assert main(words) == 0
    assert f"{len(there)} are there" in capsys.readouterr().out
    assert contents(folder) == contents(whole)


def test_all_ranks_killed_anywhere_one_process_goes_on(long_run, ranks, tmp_path, capsys):
    arguments, whole = long_run
    words = [*arguments, str(tmp_path / "cache")]
    processes = ranks(2, words)
    processes.wait_for_shards(10)
    processes.kill()
    assert processes.exit_codes() == [-signal.SIGKILL, -signal.SIGKILL]
    assert_goes_on(words, whole, capsys, lost=2)


def test_one_rank_killed_ends_the_others_with_an_error(long_run, ranks, tmp_path, capsys):
    """The others write their shares, then miss the dead one (a launcher ends them at once)."""
    arguments, whole = long_run
    words = [*arguments, str(tmp_path / "cache")]
    processes = ranks(2, words)
    processes.wait_for_shards(10)
    processes.ranks[1].kill()
    assert processes.exit_codes() == [2, -signal.SIGKILL]
    assert "error: rank 0: " in processes.log.read_text()
    assert_goes_on(words, whole, capsys, lost=1)


def test_ranks_write_what_one_process_writes_and_an_error_is_said_once(long_run, ranks, tmp_path):
    arguments, whole = long_run
    assert ranks(3, [*arguments, str(tmp_path / "cache")]).exit_codes() == [0, 0, 0]
    assert contents(tmp_path / "cache") == contents(whole)
    processes = ranks(2, [*arguments[:-1], "--max_length", "13", "--teacher_cache", str(tmp_path / "cache")])
    assert processes.exit_codes() == [2, 2]
    assert processes.log.read_text().count("error: ") == 1
    assert "rank 0: the teacher cache" in processes.log.read_text()

"""Writing a teacher cache: every rank its share of the missing shards, one teacher in memory at a time.

Rank 0 plans (index, what is missing, room on the disk), the ranks check and compute shards without talking to each
other, rank 0 reports. What was written stays: an interrupted run, on any number of ranks, computes what is missing.
"""

import contextlib
import gc
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from deepalign.data.chat import EncodedExample
from deepalign.data.files import open_locked
from deepalign.data.steps import pad
from deepalign.output_head import check_output_head, hidden_states, output_head
from deepalign.train.frozen_heads import load_output_head
from deepalign.train.ranks import Ranks
from deepalign.train.teacher_cache import (
    DTYPES,
    INDEX_FILE,
    TEACHERS,
    CacheIndex,
    DamagedIndexError,
    damaged_shards,
    read_index,
    shard_files,
    shard_path,
    shards_of,
    write_index,
    write_shard,
)
from deepalign.train.teacher_fingerprint import check_fingerprint

MIB = 2**20
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class Teacher:
    """How to get one teacher: `path`, a folder or hub id, and `load`, which gives the model, frozen, on its device."""

    path: str
    load: Callable[[], PreTrainedModel]


@dataclass
class Work:
    """What one rank has done for one teacher."""

    shards: int = 0
    rows: int = 0
    bytes: int = 0
    tokens: int = 0  # of the examples, prompts included
    seconds: float = 0.0  # computing and writing
    loading: float = 0.0  # seconds


@dataclass
class Report:
    """What was found and what was done; `work` per teacher, summed over ranks (seconds: the longest)."""

    index: CacheIndex
    found: dict[str, int]
    repaired: list[str]
    work: dict[str, Work] = field(default_factory=dict)


def write_teacher_cache(
    folder: Path,
    plan: CacheIndex,
    teachers: Mapping[str, Teacher],
    examples: Sequence[EncodedExample],
    pad_token_id: int,
    *,
    ranks: Ranks,
    batch_tokens: int = 8192,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Compute and write every shard that is not there whole. To be called by all ranks.

    Args:
        folder: of the cache; made where it is missing.
        plan: the index that a new cache gets; an old one of the same fingerprint keeps its own shards.
        teachers: "aligned" and "base".
        examples: all streams in turn, as in `plan.answer_lengths`.
        pad_token_id: any token; padded positions are masked.
        ranks: this rank among all.
        batch_tokens: positions, padding included, of one forward (a longer example runs alone).
        overwrite: delete a cache that is there instead of going on with it.
        progress: show bars.

    Raises:
        ValueError: a cache of something else is there, or a teacher with values that are not finite.
        OSError: not enough room on the disk, or a write that failed: the message has the bytes needed.
        RuntimeError: another process writes this cache.
    """
    with _only_writer(folder, ranks):
        index = ranks.on_first(lambda: _open_or_create(folder, plan, overwrite))
        mine = ranks.share(index.all_shards)
        there = [(teacher, shard) for teacher, shard in mine if shard_path(folder, teacher, shard).exists()]
        damaged = damaged_shards(folder, index, _bar(there, "check", ranks, progress))
        # every rank sees the same list, whatever number of ranks wrote the shards
        absent = {item for part in ranks.gather([item for item in mine if item not in there]) for item in part}
        problems = [item for part in ranks.gather(damaged) for item in part]
        missing = sorted(absent | {(teacher, shard) for teacher, shard, _ in problems})
        found = {teacher: index.shards - sum(name == teacher for name, _ in missing) for teacher in TEACHERS}
        report = Report(index, found, [problem for _, _, problem in problems])
        ranks.on_first(lambda: _announce(folder, report, missing))
        for teacher in TEACHERS:
            shards = [shard for name, shard in missing if name == teacher]
            job = _Job(folder, index, teacher, teachers[teacher], examples, pad_token_id, batch_tokens)
            parts = ranks.gather(job.run(ranks.share(shards), ranks, progress))
            report.work[teacher] = _together(parts)
        return report


@dataclass(frozen=True)
class _Job:
    """The shards of one teacher."""

    folder: Path
    index: CacheIndex
    name: str
    teacher: Teacher
    examples: Sequence[EncodedExample]
    pad_token_id: int
    batch_tokens: int

    def run(self, shards: Sequence[int], ranks: Ranks, progress: bool) -> Work:
        work = Work()
        if not shards:
            return work
        start = time.perf_counter()
        model = self.teacher.load()
        _check_teacher(self.name, self.teacher.path, model)
        work.loading = time.perf_counter() - start
        start = time.perf_counter()
        total = sum(self.index.shard_rows(shard) for shard in shards)
        name = self.name if ranks.count == 1 else f"{self.name}, rank 0 of {ranks.count}"
        with tqdm(total=total, desc=name, unit="row", disable=not (progress and ranks.is_first)) as bar:
            for shard in shards:
                hidden_NH = self._hidden(model, shard)
                self._write(shard, hidden_NH, shards[work.shards :])
                work.shards += 1
                work.rows += len(hidden_NH)
                work.bytes += self.index.shard_bytes(self.name, shard)
                work.tokens += sum(len(self.examples[i].input_ids) for i in self.index.examples(shard))
                bar.update(len(hidden_NH))
        work.seconds = time.perf_counter() - start
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return work

    def _hidden(self, model: PreTrainedModel, shard: int) -> Tensor:
        """(rows of the shard, H) in the cache's dtype, on the CPU."""
        examples = self.index.examples(shard)
        first = self.index.offsets[examples.start]
        shape = self.index.shard_rows(shard), self.index.hidden_sizes[self.name]
        hidden_NH = torch.empty(shape, dtype=DTYPES[self.index.dtype])
        for batch in batches_by_length([len(self.examples[i].input_ids) for i in examples], self.batch_tokens):
            numbers = [examples[place] for place in batch]
            parts = answer_hidden_states(model, [self.examples[i] for i in numbers], self.pad_token_id)
            for i, part in zip(numbers, parts, strict=True):
                hidden_NH[self.index.offsets[i] - first : self.index.offsets[i + 1] - first] = part
        if not bool(hidden_NH.isfinite().all()):
            raise ValueError(
                f"{self.name} ({self.teacher.path}) gives hidden states that are not finite in the examples "
                f"{examples.start} to {examples.stop - 1}, stored as {self.index.dtype}; check its weights and dtype"
            )
        return hidden_NH

    def _write(self, shard: int, hidden_NH: Tensor, left: Sequence[int]) -> None:
        try:
            write_shard(self.folder, self.index, self.name, shard, hidden_NH)
        except OSError as error:
            needed = sum(self.index.shard_bytes(self.name, number) for number in left)
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                f"writing {shard_path(self.folder, self.name, shard)} failed ({error.strerror or error}): this shard "
                f"needs {self.index.shard_bytes(self.name, shard)} bytes, the {len(left)} that this rank has left of "
                f"{self.name} {needed} bytes, and {free} bytes are free. What was written stays: make room and run the "
                "same command again"
            ) from error


@torch.no_grad()
def answer_hidden_states(
    model: PreTrainedModel, examples: Sequence[EncodedExample], pad_token_id: int
) -> Iterator[Tensor]:
    """Per example, (answer tokens, H) on the CPU: the last hidden states at the positions that predict its answer."""
    batch, _ = pad(examples, pad_token_id)
    hidden_BTH = hidden_states(model, batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device))
    for hidden_TH, example in zip(hidden_BTH, examples, strict=True):
        # the row before a token predicts it
        yield hidden_TH[example.response_start - 1 : len(example.input_ids) - 1].cpu()


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places in `lengths`, longest first, in batches of one or of at most `batch_tokens` positions with padding."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // lengths[order[start]])
        yield order[start : start + count]
        start += count


def _check_teacher(name: str, path: str, model: PreTrainedModel) -> None:
    """Training multiplies the cached hidden states with the head that it reads from the checkpoint by itself."""
    check_output_head(model)
    head = output_head(model).lm_head
    if not torch.equal(load_output_head(path, head.dtype).lm_head, head.cpu()):
        raise ValueError(
            f"the output layer of {name} ({path}) is another one in the loaded model than in its weight files; it "
            "cannot be cached: train with teacher: online"
        )


# ---- rank 0 ----


def _open_or_create(folder: Path, plan: CacheIndex, overwrite: bool) -> CacheIndex:
    if overwrite:
        (folder / INDEX_FILE).unlink(missing_ok=True)  # first: without it the shards are nobody's
        for path in shard_files(folder):
            path.unlink()
    for path in folder.glob(".*.incomplete"):  # of a killed process: this one holds the lock
        path.unlink()
    if not (folder / INDEX_FILE).exists():
        write_index(folder, plan)
    try:
        index = read_index(folder)
    except DamagedIndexError:
        index = _restore_index(folder, plan)
    remedy = "give another folder (teacher_cache), or --overwrite to delete it and start again"
    saved, now = ({**it.fingerprint, "stored_dtype": it.dtype} for it in (index, plan))
    check_fingerprint(folder, saved, now, remedy)
    return index


def _restore_index(folder: Path, plan: CacheIndex) -> CacheIndex:
    """Write a damaged index again, if shards carry the name that `plan` gives them: then it was the same.

    The name is a checksum of the whole index, fingerprint included; shards of other contents are found later.
    """
    there = len(shard_files(folder))
    if not shards_of(folder, plan.identity):
        raise ValueError(
            f"{folder / INDEX_FILE} is damaged, and none of the {there} shards beside it was written with this "
            "configuration, --dtype and --shard-mib: give those it was written with, which keeps the shards, or "
            "--overwrite, which deletes them and computes all again"
        )
    print(f"{folder / INDEX_FILE} was damaged: written again, its shards are kept", flush=True)
    write_index(folder, plan)
    return plan


def _announce(folder: Path, report: Report, missing: Sequence[tuple[str, int]]) -> None:
    """Print the size before anything is computed, and refuse a disk that is too small."""
    index = report.index
    needed = sum(index.shard_bytes(teacher, shard) for teacher, shard in missing)
    free = shutil.disk_usage(folder).free
    sizes = " + ".join(str(index.hidden_sizes[teacher]) for teacher in TEACHERS)
    print(
        f"teacher cache {folder}: {index.rows} answer tokens x ({sizes}) {index.dtype} = "
        f"{index.total_bytes() / MIB:.1f} MiB in {2 * index.shards} shards; {2 * index.shards - len(missing)} are "
        f"there, {needed / MIB:.1f} MiB to write, {free / MIB:.0f} MiB free",
        flush=True,
    )
    for problem in report.repaired:
        print(f"  computed again: {problem}", flush=True)
    if needed > free:
        raise OSError(
            f"the teacher cache needs {needed} more bytes in {folder} but {free} are free; make room, give another "
            "folder (teacher_cache), or cut examples shorter (max_length)"
        )


@contextlib.contextmanager
def _only_writer(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Rank 0 holds the folder's lock; the system lets go of it however the process ends."""

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(open_locked(folder / LOCK_FILE))
        except BlockingIOError:
            raise RuntimeError(f"another process writes the teacher cache {folder}; wait for it or end it") from None

    with contextlib.ExitStack() as held:
        ranks.on_first(take)
        yield


def _together(parts: Sequence[Work]) -> Work:
    total = Work()
    for name in ("shards", "rows", "bytes", "tokens"):
        setattr(total, name, sum(getattr(part, name) for part in parts))
    for name in ("seconds", "loading"):
        setattr(total, name, max(getattr(part, name) for part in parts))
    return total


def _bar(items: Sequence[tuple[str, int]], name: str, ranks: Ranks, progress: bool) -> "tqdm[tuple[str, int]]":
    return tqdm(items, desc=name, unit="shard", disable=not (progress and ranks.is_first and items))

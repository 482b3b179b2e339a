"""The teacher cache: last hidden states of the frozen teachers, computed once, read at every step.

Frozen teachers give the same hidden states in every epoch. The cache holds them at the rows that predict answer tokens
(what the lm_head multiplies, after the final norm), so that training loads two lm_heads instead of two models.

    teacher-cache/
      index.json                  fingerprint, sizes, length of every answer, first example of every shard
      aligned-00000.safetensors   {"hidden": (rows of the shard, H)}; metadata: shard, cache, checksum
      base-00000.safetensors

Rows are numbered as `StepDataset` numbers them (`answer_row`): the answer tokens of all harmful examples, then of all
utility examples, in the order of the data. A shard holds whole examples, so a row is found by its number alone,
whatever the order of an epoch. Shards are mapped, and only the rows asked for are copied.

A shard is written aside, synchronised to the disk and renamed: under its own name it is whole. `teacher_cache_write`
writes, `teacher_fingerprint` says what a cache depends on.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX_FILE = "index.json"
FORMAT = 1
TEACHERS = ("aligned", "base")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_LONGEST_HEADER = 1 << 16  # bytes; a shard's has a few hundred
_SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class DamagedShardError(ValueError):
    """A shard that is not what its index says: missing, cut short, of another cache, or with other contents."""


class DamagedIndexError(ValueError):
    """An index that cannot be read; the shards beside it may be whole."""


@dataclass(frozen=True)
class CacheIndex:
    """What a cache holds, and where.

    Attributes:
        fingerprint: what the hidden states depend on; plain JSON values, see `teacher_fingerprint`.
        dtype: of the stored hidden states, a name of torch.
        hidden_sizes: H of each teacher.
        streams: number of examples per stream (harmful, utility).
        answer_lengths: rows of every example, all streams in turn.
        shard_starts: the first example of every shard.
    """

    fingerprint: dict[str, Any]
    dtype: str
    hidden_sizes: dict[str, int]
    streams: dict[str, int]
    answer_lengths: list[int]
    shard_starts: list[int]

    @cached_property
    def identity(self) -> str:
        """Short name of this cache's contents; every shard carries it, and the index itself."""
        return f"{zlib.crc32(json.dumps(self.as_dict(), sort_keys=True).encode()):08x}"

    @cached_property
    def offsets(self) -> list[int]:
        """The first row of every example, and after the last one the number of rows."""
        return [0, *accumulate(self.answer_lengths)]

    @property
    def rows(self) -> int:
        """Number of rows of each teacher."""
        return self.offsets[-1]

    @property
    def shards(self) -> int:
        """Number of shards of each teacher."""
        return len(self.shard_starts)

    @property
    def all_shards(self) -> list[tuple[str, int]]:
        """(teacher, shard) of every shard."""
        return [(teacher, shard) for teacher in TEACHERS for shard in range(self.shards)]

    def examples(self, shard: int) -> range:
        """The examples of a shard."""
        ends = [*self.shard_starts[1:], len(self.answer_lengths)]
        return range(self.shard_starts[shard], ends[shard])

    def shard_rows(self, shard: int) -> int:
        """Number of rows of a shard."""
        examples = self.examples(shard)
        return self.offsets[examples.stop] - self.offsets[examples.start]

    def shard_bytes(self, teacher: str, shard: int) -> int:
        """Size of a shard's hidden states in bytes, without its header of a few hundred bytes."""
        return self.shard_rows(shard) * self.hidden_sizes[teacher] * DTYPES[self.dtype].itemsize

    def total_bytes(self) -> int:
        """Size of all hidden states in bytes."""
        return self.rows * sum(self.hidden_sizes.values()) * DTYPES[self.dtype].itemsize

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in `index.json`."""
        names = ("fingerprint", "dtype", "hidden_sizes", "streams", "answer_lengths", "shard_starts")
        return {"format": FORMAT, **{name: getattr(self, name) for name in names}}


def plan_shards(answer_lengths: Sequence[int], row_bytes: int, shard_bytes: int) -> list[int]:
    """The first example of every shard: whole examples in order, about `shard_bytes` each (a longer example alone)."""
    starts, filled = [0], 0
    for example, length in enumerate(answer_lengths):
        size = length * row_bytes
        if filled and filled + size > shard_bytes:
            starts.append(example)
            filled = 0
        filled += size
    return starts


# ---- index ----


def read_index(folder: Path) -> CacheIndex:
    """The index of a cache.

    Raises:
        FileNotFoundError: there is none.
        DamagedIndexError: it cannot be read.
        ValueError: it is of another version of this format.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no teacher cache ({INDEX_FILE} is missing); write it with "
            "`deepalign cache-teacher --config X.yaml`"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("format")
        if version != FORMAT:
            raise ValueError(
                f"{path} is of format {version}, expected {FORMAT}: it was written by another version of deepalign; "
                "write the cache again with --overwrite"
            )
        checksum = values.pop("crc32", None)
        index = CacheIndex(**values)
        if checksum not in (None, index.identity):
            raise TypeError("its checksum is another")
        return index
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedIndexError(
            f"{path} is damaged ({error}). Nothing else is lost by that: run `deepalign cache-teacher` with the "
            "configuration, --dtype and --shard-mib that it was written with, which writes it again and keeps the "
            f"{_shards_there(folder)} beside it"
        ) from None


def write_index(folder: Path, index: CacheIndex) -> None:
    """Write `index.json`, whole or not at all."""
    values = index.as_dict() | {"crc32": index.identity}
    write_durably(folder / INDEX_FILE, [json.dumps(values).encode() + b"\n"])


# ---- shards ----


def shard_path(folder: Path, teacher: str, shard: int) -> Path:
    """Where a shard lies."""
    return folder / f"{teacher}-{shard:05d}.safetensors"


def write_shard(folder: Path, index: CacheIndex, teacher: str, shard: int, hidden_NH: Tensor) -> None:
    """Write the hidden states of a shard, (rows of the shard, H), in the cache's dtype: whole or not at all.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    dtype = DTYPES[index.dtype]
    assert hidden_NH.shape == (index.shard_rows(shard), index.hidden_sizes[teacher])
    data = _bytes_of(hidden_NH.to("cpu", dtype).contiguous())
    header = _header(index, teacher, shard, zlib.crc32(data))
    write_durably(shard_path(folder, teacher, shard), [header, data])


def check_shard(folder: Path, index: CacheIndex, teacher: str, shard: int, contents: bool = True) -> None:
    """Refuse a shard that is missing, cut short, of another cache, or (with `contents`) altered.

    Raises:
        DamagedShardError: what is wrong with it.
    """
    path = shard_path(folder, teacher, shard)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_header_length(index, teacher, shard))
    except FileNotFoundError:
        raise DamagedShardError(f"{path.name} is missing") from None
    expected = len(header) + index.shard_bytes(teacher, shard)
    if size != expected:
        raise DamagedShardError(f"{path.name} has {size} bytes, expected {expected}")
    checksum = _checksum_in(header)
    if checksum is None or header != _header(index, teacher, shard, checksum):
        raise DamagedShardError(f"{path.name} is not a shard of this cache (cache {index.identity})")
    if contents and zlib.crc32(_bytes_of(map_shard(folder, index, teacher, shard))) != checksum:
        raise DamagedShardError(f"{path.name} has been altered: its checksum is not {checksum:08x}")


def shards_of(folder: Path, identity: str) -> int:
    """How many shards in a folder say that they are of the cache with this `CacheIndex.identity`."""
    return sum(_cache_named_in(path) == identity for path in shard_files(folder))


def shard_files(folder: Path) -> list[Path]:
    """Every file that is named like a shard."""
    return [path for teacher in TEACHERS for path in sorted(folder.glob(f"{teacher}-?????.safetensors"))]


def map_shard(folder: Path, index: CacheIndex, teacher: str, shard: int) -> Tensor:
    """The hidden states of a shard, (rows of the shard, H), mapped: nothing is read before it is asked for."""
    path = str(shard_path(folder, teacher, shard))
    start, size = _header_length(index, teacher, shard), index.shard_bytes(teacher, shard)
    # torch's mapping keeps no file open: a large cache has more shards than a process may have files
    mapped = torch.from_file(path, shared=False, size=start + size, dtype=torch.uint8)
    return mapped[start:].view(DTYPES[index.dtype]).view(-1, index.hidden_sizes[teacher])


def _header(index: CacheIndex, teacher: str, shard: int, checksum: int) -> bytes:
    """A safetensors header: its length, then JSON padded to a multiple of 8."""
    size = index.shard_bytes(teacher, shard)
    shape = [index.shard_rows(shard), index.hidden_sizes[teacher]]
    tensor = {"dtype": _SAFETENSORS_NAMES[DTYPES[index.dtype]], "shape": shape, "data_offsets": [0, size]}
    metadata = {"teacher": teacher, "shard": str(shard), "cache": index.identity, "crc32": f"{checksum:08x}"}
    text = json.dumps({"__metadata__": metadata, "hidden": tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header_length(index: CacheIndex, teacher: str, shard: int) -> int:
    return len(_header(index, teacher, shard, 0))


def _checksum_in(header: bytes) -> int | None:
    try:
        return int(json.loads(header[8:])["__metadata__"]["crc32"], 16)
    except (ValueError, KeyError, TypeError):
        return None


def _cache_named_in(path: Path) -> str | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LONGEST_HEADER))
    try:
        return str(json.loads(header)["__metadata__"]["cache"])
    except (ValueError, KeyError, TypeError):
        return None


def _shards_there(folder: Path) -> str:
    files = shard_files(folder)
    return f"{len(files)} shards ({sum(path.stat().st_size for path in files) / 2**20:.1f} MiB)"


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


# ---- reading ----


class TeacherCache:
    """A whole cache, opened for reading by row.

    Args:
        folder: of the cache.
        index: of the cache, as read and compared by the caller; None reads it.

    Raises:
        FileNotFoundError: no cache there.
        DamagedShardError: shards that are missing, cut short or of another cache; what to do.
    """

    def __init__(self, folder: Path, index: CacheIndex | None = None) -> None:
        self.folder = folder
        self.index = read_index(folder) if index is None else index
        self._row_starts = torch.tensor([self.index.offsets[start] for start in self.index.shard_starts])
        refuse_damaged(folder, damaged_shards(folder, self.index, self.index.all_shards, contents=False))
        self._mapped = {
            teacher: [map_shard(folder, self.index, teacher, shard) for shard in range(self.index.shards)]
            for teacher in TEACHERS
        }

    def rows(self, teacher: str, answer_row_R: Tensor, pin_memory: bool = False) -> Tensor:
        """Hidden states (R, H) of one teacher, in the cache's dtype, at the rows named.

        Args:
            teacher: "aligned" or "base".
            answer_row_R: (R,) int64 on the CPU, in [0, rows). Runs of rows of one shard are copied together.
            pin_memory: hand back page-locked memory, for a copy to a GPU that does not wait.
        """
        hidden_RH = torch.empty(
            len(answer_row_R),
            self.index.hidden_sizes[teacher],
            dtype=DTYPES[self.index.dtype],
            pin_memory=pin_memory,
        )
        shard_R = torch.bucketize(answer_row_R, self._row_starts, right=True) - 1
        within_R = answer_row_R - self._row_starts[shard_R]
        shards, counts = torch.unique_consecutive(shard_R, return_counts=True)
        start = 0
        for shard, count in zip(shards.tolist(), counts.tolist(), strict=True):
            rows = slice(start, start + count)
            torch.index_select(self._mapped[teacher][shard], 0, within_R[rows], out=hidden_RH[rows])
            start += count
        return hidden_RH


def damaged_shards(
    folder: Path, index: CacheIndex, shards: Iterable[tuple[str, int]], contents: bool = True
) -> list[tuple[str, int, str]]:
    """(teacher, shard, what is wrong) of those of `shards` that cannot serve."""
    found = []
    for teacher, shard in shards:
        try:
            check_shard(folder, index, teacher, shard, contents)
        except DamagedShardError as error:
            found.append((teacher, shard, str(error)))
    return found


def refuse_damaged(folder: Path, damaged: Sequence[tuple[str, int, str]]) -> None:
    """Raise `DamagedShardError` if there is anything in `damaged`."""
    if damaged:
        examples = "; ".join(problem for _, _, problem in damaged[:3])
        raise DamagedShardError(
            f"the teacher cache {folder} is not whole: {len(damaged)} shard(s) cannot be used ({examples}); "
            "run `deepalign cache-teacher` with the same configuration, which computes exactly these"
        )


# ---- files ----


def write_durably(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write `parts` beside `path`, synchronise to the disk, rename: a crash at any time leaves a whole file or none.

    Raises:
        OSError: the file cannot be written; what was written of it is deleted.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".incomplete")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

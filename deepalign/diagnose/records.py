"""One record per context, in a file that survives a kill and is read without being loaded.

A record holds what was measured at every position of one response, in a fixed number of bytes:

    length        positions measured, 1 <= length <= T
    forced        how many of them are a forced prefix
    ids           (T,) the response's tokens, -1 beyond `length`
    kl, ...       (T,) each of `rows.STATISTICS`, float64, NaN beyond `length`
    favored       (T, k) the most base-favored tokens, descending, -1 for none

Records are appended batch by batch and synced to disk. Beside `NAME.records` lies `NAME.records.settings.json`, the
fingerprint of what decides the numbers: a file of another run is refused, half a record (or half a batch) that a kill
has left is cut off. Readers map the file, so memory does not grow with the number of contexts.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deepalign.data.files import naming, write_text_atomic
from deepalign.data.resumable import locked, read_settings, settings_path
from deepalign.diagnose.rows import STATISTICS, RowStatistics

READ_AT_ONCE = 64  # records


def record_type(positions: int, top_k: int) -> np.dtype:
    """The type of a record for T = `positions` and k = `top_k`."""
    statistics = [(name, "<f8", (positions,)) for name in STATISTICS]
    head = [("length", "<i4"), ("forced", "<i4"), ("ids", "<i4", (positions,))]
    return np.dtype([*head, *statistics, ("favored", "<i4", (positions, top_k))])


def make_records(
    rows: RowStatistics, responses: Sequence[Sequence[int]], forced: Sequence[int], record: np.dtype
) -> np.ndarray:
    """Records of several responses from the statistics of their rows, one response after another."""
    records = np.zeros(len(responses), dtype=record)
    records["length"] = [len(response) for response in responses]
    records["forced"] = forced
    for name in ("ids", "favored"):
        records[name] = -1
    columns = {name: getattr(rows, name).double().cpu().numpy() for name in STATISTICS}
    favored_NK = rows.favored_tokens.cpu().numpy()
    start = 0
    for index, response in enumerate(responses):
        end = start + len(response)
        records["ids"][index, : len(response)] = response
        for name, values_N in columns.items():
            records[name][index] = np.nan
            records[name][index, : len(response)] = values_N[start:end]
        records["favored"][index, : len(response), : favored_NK.shape[1]] = favored_NK[start:end]
        start = end
    assert start == len(favored_NK), "every row belongs to a response"
    return records


class RecordFile:
    """Records being written; use `writing`."""

    def __init__(self, file: BinaryIO, record: np.dtype, done: int) -> None:
        self._file, self._record, self.done = file, record, done

    def append(self, records: np.ndarray) -> None:
        """Append and sync to disk."""
        assert records.dtype == self._record
        with naming(self._file.name):
            self._file.write(records.tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.done += len(records)


@contextmanager
def writing(
    path: Path, record: np.dtype, settings: dict[str, Any], total: int, batch_size: int
) -> Iterator[RecordFile]:
    """Open `path` to go on where it was.

    Args:
        path: created where it is missing.
        record: type of its records.
        settings: whatever decides the numbers; JSON.
        total: records of the whole run.
        batch_size: records are appended in batches of so many; the rest of a batch is cut off and measured again, so
            that an interrupted run computes the same batches, and with them the same bits, as one that was not.

    Raises:
        ValueError: the file belongs to a run with other settings, or another process writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path) as file:
        size = os.fstat(file.fileno()).st_size
        _check_settings(path, {**settings, "record": str(record.descr)}, empty=size == 0)
        done = size // record.itemsize
        if done > total:
            raise ValueError(f"{path} holds {done} records of {total}; the file was changed: remove it")
        if done < total:
            done -= done % batch_size
        file.truncate(done * record.itemsize)
        yield RecordFile(file, record, done)


def _check_settings(path: Path, settings: dict[str, Any], *, empty: bool) -> None:
    known, fingerprint = settings_path(path), json.dumps(settings, sort_keys=True, indent=1)
    if empty:
        write_text_atomic(known, fingerprint + "\n")
        return
    if not known.is_file():
        raise ValueError(f"{path} exists but has no {known.name} beside it: give another --out")
    before, now = read_settings(known), json.loads(fingerprint)
    if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        raise ValueError(
            f"{path} was written with other settings ({', '.join(changed)}); give another --out, or remove the file "
            "to measure it again"
        )


def read_records(path: Path, record: np.dtype, start: int = 0) -> Iterator[np.ndarray]:
    """The records of a file from `start` on, some at a time; each is a copy, nothing stays mapped."""
    count = path.stat().st_size // record.itemsize
    with path.open("rb") as file:
        file.seek(start * record.itemsize)
        while start < count:
            size = min(READ_AT_ONCE, count - start)
            yield np.fromfile(file, dtype=record, count=size)
            start += size

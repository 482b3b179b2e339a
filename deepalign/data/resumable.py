"""JSONL files that grow batch by batch and survive a kill: what sampling and the evaluations write their answers to.

Beside `OUT` lies `OUT.settings.json`: a fingerprint of everything that decides what the lines say. Lines are appended
and synced to disk as soon as a batch is done. A later run keeps the whole lines, cuts off half a line that a kill has
left, and goes on; with another fingerprint it refuses the file. A lock, which ends with its process, keeps a second
writer out.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from deepalign.data.files import naming, open_locked, write_text_atomic

PIECES, PIECE_BYTES = 256, 1 << 12  # of each weight file that go into its fingerprint
WEIGHTS = (".safetensors", ".bin", ".pt")
READ_WHOLE = (".json", ".jinja", ".model")
VOCABULARY = ("vocab.txt", "merges.txt")
Row = dict[str, Any]


class ResumableFile:
    """A file opened by `open_resumable`.

    Attributes:
        rows: the rows that were there, in the order of the file; `append` adds to them.
    """

    def __init__(self, file: BinaryIO, rows: list[Row]) -> None:
        self._file = file
        self.rows = rows

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows, one JSON object a line, and wait until they are on the disk."""
        with naming(self._file.name):
            self._file.write(b"".join(map(_line, rows)))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows.extend(rows)


@contextmanager
def open_resumable(
    path: str | os.PathLike[str], settings: Mapping[str, Any], check_row: Callable[[int, Row], str | None]
) -> Iterator[ResumableFile]:
    """Create `path`, or open it to go on where it ends.

    Args:
        path: of the JSONL file; its folder is created where it is missing.
        settings: what decides the rows, as JSON can hold it; compared with the file's fingerprint key by key.
        check_row: called with the number (from 0) and the content of each row that is there; returns what is wrong
            with it, or None.

    Raises:
        ValueError: another process writes the file, no run of this kind wrote it, it was written with other settings,
            or a row is not one of this run.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path) as file:
        yield ResumableFile(file, _whole_rows(file, path, settings, check_row))


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Open for reading and appending, with a lock that ends with the process.

    Raises:
        ValueError: another process holds the lock.
    """
    with ExitStack() as held:
        try:
            file = held.enter_context(open_locked(path))
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another process; wait, or give another output") from None
        yield file


def settings_path(path: Path) -> Path:
    """Where the fingerprint of an output file lies."""
    return path.with_name(f"{path.name}.settings.json")


def model_fingerprint(path: str) -> Any:
    """What tells one checkpoint from another: of a folder, its JSON files, chat template and vocabulary, and size and
    evenly spaced pieces of its weights.

    Weights are not read whole, for they may be hundreds of GB: a MiB of each file, in pieces closer together than the
    matrices of a model are large. A hub id is its own fingerprint.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    found = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in READ_WHOLE + WEIGHTS or file.name in VOCABULARY:
            read = _pieces(file) if file.suffix in WEIGHTS else file.read_bytes()
            found[file.name] = [file.stat().st_size, hashlib.sha256(read).hexdigest()]
    return found


def _pieces(file: Path) -> bytes:
    """Evenly spaced pieces of a file, the first bytes and the last ones among them; all of a small file."""
    last = file.stat().st_size - PIECE_BYTES
    if last < PIECES * PIECE_BYTES:
        return file.read_bytes()
    read = []
    with file.open("rb") as content:
        for piece in range(PIECES):
            content.seek(last * piece // (PIECES - 1))
            read.append(content.read(PIECE_BYTES))
    return b"".join(read)


def _whole_rows(
    file: BinaryIO, path: Path, settings: Mapping[str, Any], check_row: Callable[[int, Row], str | None]
) -> list[Row]:
    """Rows of the whole lines; half a line at the end is cut off."""
    file.seek(0)
    content = file.read()
    if not content:
        write_text_atomic(settings_path(path), json.dumps(settings, sort_keys=True, indent=1) + "\n")
        return []
    _check_settings(path, settings)
    whole = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines()):
        row = json_object(line)
        wrong = "is no JSON object" if row is None else check_row(number, row)
        if row is None or wrong is not None:
            raise ValueError(f"{path}:{number + 1} {wrong}; the file was changed: remove it, or from that line on")
        rows.append(row)
    if len(whole) < len(content):
        file.truncate(len(whole))
    return rows


def _line(row: Row) -> bytes:
    """A row as a line of the file; half a surrogate pair, as an input's own keys may hold, is escaped."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()


def json_object(text: bytes) -> Row | None:
    """The JSON object that `text` is; None where it is none."""
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_settings(path: Path) -> dict[str, Any]:
    """The fingerprint beside an output file.

    Raises:
        ValueError: it is damaged.
    """
    return read_object(path, "nobody knows what its output was made with: give another output")


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it is damaged; `remedy` says what to do.
    """
    found = json_object(path.read_bytes())
    if found is None:
        raise ValueError(f"{path} is damaged; {remedy}")
    return found


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    known = settings_path(path)
    if not known.is_file():
        raise ValueError(
            f"{path} exists but has no {known.name} beside it: no run of this command wrote it; give another output"
        )
    before, now = read_settings(known), json.loads(json.dumps(settings))
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"{path} was written with other settings ({', '.join(changed)}); give another output, or remove it with "
            f"{known.name} to start again"
        )

"""Reading conversations from JSONL and writing files so that a reader never sees half of one.

Two row formats are read, one conversation a line:

    {"prompt": "how do i ...", "completion": "sure , ..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Further keys in a row are ignored, so that a file can carry its own metadata.
"""

import codecs
import errno
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

Message = dict[str, str]
Row = TypeVar("Row")
ROLES = ("system", "user", "assistant", "tool")
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def read_jsonl(path: str | os.PathLike[str]) -> list[list[Message]]:
    """Read conversations that end with the assistant's answer.

    Args:
        path: a UTF-8 file with one JSON object a line (formats above); blank lines are skipped.

    Returns:
        One list of messages per row, the last of role "assistant".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not such a row (the message names file, line and what is wrong), or the file has no row.
    """
    return read_rows(path, _conversation)


def read_rows(path: str | os.PathLike[str], read: Callable[[Any], Row]) -> list[Row]:
    """`read` of every JSON line that is not blank; its `ValueError` is raised with file and line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist; give the path of a JSONL file")
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not (line := line.removeprefix(codecs.BOM_UTF8)).strip():
                continue
            try:
                rows.append(read(json.loads(line.decode())))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not valid JSON ({error}); each line must be one JSON object"
                ) from None
            except RecursionError:
                raise ValueError(f"{path}:{number}: nested too deeply; each line must be one JSON object") from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no rows; expected one JSON object a line")
    return rows


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        # not splitlines: a text may hold U+2028
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def read_prompts(
    path: str | os.PathLike[str], reserved: Sequence[str] = ()
) -> list[tuple[list[Message], dict[str, Any]]]:
    """Read prompts: rows as of `read_jsonl` without their last answer.

    Args:
        path: a UTF-8 file with one JSON object a line: {"prompt": text or messages}, or {"messages": [...]} whose last
            message is not the assistant's.
        reserved: keys that a row may not have.

    Returns:
        The messages and the whole object of each row.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not such a row, or the file has no row.
    """
    return read_rows(path, lambda row: (_prompt(row, reserved), row))


def _prompt(row: Any, reserved: Sequence[str]) -> list[Message]:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    if taken := [key for key in reserved if key in row]:
        raise ValueError(f"the keys {', '.join(taken)} are written by this command; rename them")
    if ("prompt" in row) == ("messages" in row):
        raise ValueError(f"expected either the key 'prompt' or 'messages'; got {sorted(row)}")
    messages = _messages(row["messages"], "messages") if "messages" in row else _side(row["prompt"], "prompt", "user")
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; expected one that it can answer")
    return messages


def _conversation(row: Any) -> list[Message]:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
    elif "prompt" in row and "completion" in row:
        messages = _side(row["prompt"], "prompt", "user") + _side(row["completion"], "completion", "assistant")
    else:
        raise ValueError(f"expected the keys 'prompt' and 'completion', or 'messages'; got {sorted(row)}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("the conversation must have at least two messages and end with the assistant's answer")
    return messages


def _side(value: Any, key: str, role: str) -> list[Message]:
    """A prompt or a completion: a string is one message of `role`, a list is messages already."""
    return _messages([{"role": role, "content": value}] if isinstance(value, str) else value, key)


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{key}' must be a string or a non-empty list of messages, got {value!r:.60}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"each message in '{key}' needs 'role' and 'content', got {message!r:.60}")
        if message["role"] not in ROLES:
            raise ValueError(f"unknown role {message['role']!r} in '{key}'; expected one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError(
                f"the content of a message in '{key}' must be a non-empty string, got {message['content']!r:.60}"
            )
        check_text(f"the content of a message in '{key}'", message["content"])
        if calls := [name for name in ("tool_calls", "function_call") if message.get(name)]:
            raise ValueError(f"a message in '{key}' has {calls[0]}, which are not read; leave such conversations out")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def check_text(name: str, text: str) -> None:
    """Refuse half a surrogate pair, which JSON can hold and no tokenizer takes.

    Raises:
        ValueError: which, and where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half a surrogate pair, {text[error.start]!a} at character {error.start}: a text that was "
            "cut inside an emoji, or the like; remove it"
        ) from None


def check_folder(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse, before anything runs, an output folder that is a file or lies below one; `name` is the option's.

    Raises:
        NotADirectoryError: which file.
        ValueError: `~` or `$NAME`, as a configuration or `--out=~/x` has them: a folder of that name would be made.
    """
    if unreplaced := re.search(r"^~[^/]*|\$\w+|\$\{\w+\}", str(path)):
        raise ValueError(f"{name}: {path}: {unreplaced[0]} is what a shell replaces, and none did; write the path out")
    for place in (Path(path), *Path(path).parents):
        if place.is_dir():
            return
        if place.exists():
            raise NotADirectoryError(f"{name}: {place} is a file; give a folder, or a path where none is yet")


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an error of the system, as of a full disk, the file's name, which it lacks where a file is open already."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def open_locked(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for reading and appending, with a lock that ends with the block, or with the process.

    A file system without locks (Lustre, unless it is mounted with them) is said so and goes without.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    with Path(path).open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"warning: {path}: this file system has no locks; start no second process that writes it", flush=True)
        yield file


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` so that the file is always either the old one or the new one, whole, also after a crash.

    The folder is created where it is missing. A temporary file beside the target is synchronised to the disk and
    renamed over it.

    Raises:
        OSError: naming `path`; nothing is left of the temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with naming(path), os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, one JSON object a line, as `write_text_atomic` writes."""
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))

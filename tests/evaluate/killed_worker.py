"""The command line, in a process that stops in the middle of a line of its answers, until it is killed."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepalign.cli import main
from deepalign.data.resumable import ResumableFile
from tests.forked import kill_when
from tests.train.forked import fork

STOPPED = "half a line is written"


def stop_in_a_line(words: Sequence[str], name: str, rows: int) -> int:
    """Once an answers file whose path has `name` in it holds `rows` rows or more."""
    append = ResumableFile.append

    def half(file: ResumableFile, added: Sequence[dict[str, Any]]) -> None:
        append(file, added)
        if name in file._file.name and "answers" in file._file.name and len(file.rows) >= rows:
            file._file.write(b'{"depth": 2, "ind')
            file._file.flush()
            print(STOPPED, flush=True)
            time.sleep(600)

    ResumableFile.append = half
    return main(words)


def kill_in_a_line(words: Sequence[str], name: str, rows: int, log: Path) -> None:
    """Run a command in a process of its own until it has stopped, and kill it for good."""

    def said() -> str:
        return log.read_text() if log.exists() else ""

    process = fork(stop_in_a_line, [words, name, rows], log)
    kill_when(lambda: STOPPED in said(), process, said)

"""The published data sets' own file formats, as conversations.

Each reader takes one file and returns one `Record` a row: messages, whose last one is the assistant's where the data
set has answers, and a label where it has one. Files are read as their authors publish them: CSV with or without a
header, JSONL, parquet.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign.data.files import Message, check_text, read_rows

# HEx-PHI's categories; the second was withdrawn by its authors, so copies with and without it circulate.
HEX_PHI_CATEGORIES = {
    1: "Illegal Activity",
    2: "Child Abuse Content",
    3: "Hate/Harass/Violence",
    4: "Malware",
    5: "Physical Harm",
    6: "Economic Harm",
    7: "Fraud/Deception",
    8: "Adult Content",
    9: "Political Campaigning",
    10: "Privacy Violation Activity",
    11: "Tailored Financial Advice",
}

# A request and the start of an answer are sentences: a first row with fewer words is a header under other names.
WORDS_OF_A_TEXT = 3


@dataclass(frozen=True)
class Record:
    """One row of a data set: a conversation (or a prompt alone) and its label, for example a category."""

    messages: list[Message]
    label: str | None = None


Reader = Callable[[Path], list[Record]]


def read_advbench(path: Path) -> list[Record]:
    """AdvBench: `goal,target` (the hub's copy says `prompt`), with a header or without one."""
    return _each(
        path,
        table(path, headerless=("goal", "target")),
        lambda row: Record(exchange(_first(row, "goal", "prompt", "instruction"), _first(row, "target"))),
    )


def read_hex_phi(path: Path) -> list[Record]:
    """HEx-PHI: `category_N.csv` of one column without a header, or JSONL with `instruction` and `category`."""
    if path.suffix == ".jsonl":
        return _each(path, table(path), lambda row: Record(_prompt(_first(row, "instruction", "prompt")), _label(row)))
    number = re.search(r"category_(\d+)", path.name)
    label = HEX_PHI_CATEGORIES.get(int(number[1])) if number else None
    return _each(path, table(path, headerless=("prompt",)), lambda row: Record(_prompt(row["prompt"]), label))


def read_pairs(path: Path) -> list[Record]:
    """Harmful pairs: a JSON list `[{role, content}, {role, content}]` a line, the last message the assistant's."""

    def record(row: Any) -> Record:
        if not isinstance(row, list) or len(row) < 2 or not all(isinstance(message, dict) for message in row):
            raise ValueError(f"expected a list of two messages, got {row!r:.60}")
        messages = [{"role": str(m.get("role")), "content": _text(m, "content")} for m in row]
        if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
            raise ValueError(f"expected a user's message and the assistant's, got {[m['role'] for m in messages]}")
        return Record(messages)

    return read_rows(path, record)


def read_dolly(path: Path) -> list[Record]:
    """Dolly: `instruction,context,response,category`; a context follows the instruction after an empty line.

    Rows without an instruction or a response are left out.
    """

    def record(row: dict[str, Any]) -> Record:
        instruction, context = _first(row, "instruction").strip(), str(row.get("context") or "").strip()
        prompt = f"{instruction}\n\n{context}" if context else instruction
        return Record(exchange(prompt, _first(row, "response").strip()), _label(row))

    def is_whole(row: dict[str, Any]) -> bool:
        return all(str(row.get(key, "missing") or "").strip() for key in ("instruction", "response"))

    return _each(path, [numbered for numbered in table(path) if is_whole(numbered[1])], record)


def read_gsm8k(path: Path) -> list[Record]:
    """GSM8K: `question,answer`; the answers keep their `<<...>>` annotations and the `####` line."""
    return _each(path, table(path), lambda row: Record(exchange(_first(row, "question"), _first(row, "answer"))))


# ---- tables ----


def table(path: Path, headerless: Sequence[str] = ()) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a CSV, JSONL or parquet file as dicts, with their numbers from 1.

    Args:
        path: the file; its suffix says its format.
        headerless: names of the columns of a CSV file without a header. A first row that holds the last of these
            names is a header all the same, and one that does not read like texts is a header of another format.

    Raises:
        ValueError: another suffix, another header, or a CSV row that does not fit its header.
        RuntimeError: parquet without pyarrow.
    """
    if path.suffix == ".csv":
        return list(_csv_rows(path, headerless))
    if path.suffix in (".jsonl", ".json"):
        return list(enumerate(read_rows(path, _object), start=1))
    if path.suffix == ".parquet":
        return list(enumerate(_parquet_rows(path), start=1))
    raise ValueError(f"{path}: expected a .csv, .jsonl or .parquet file")


def _csv_rows(path: Path, headerless: Sequence[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        limit = csv.field_size_limit(sys.maxsize)  # a text may have more than 131072 characters
        try:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if any(row)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        except csv.Error as error:
            raise ValueError(f"{path}: not CSV ({error})") from None
        finally:
            csv.field_size_limit(limit)
    if not rows:
        raise ValueError(f"{path} has no rows")
    columns = [name.strip().lower() for name in rows[0][1]]
    if not headerless or headerless[-1] in columns:
        rows = rows[1:]
    else:
        _check_headerless(path, rows[0][1], headerless)
        columns = list(headerless)
    for number, row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"{path}: row {number} has {len(row)} fields; expected {len(columns)} ({','.join(columns)}). "
                "Texts with commas need double quotes"
            )
        yield number, dict(zip(columns, row, strict=True))


def _check_headerless(path: Path, first: list[str], columns: Sequence[str]) -> None:
    """Refuse a first row that is a header, which would become a request."""
    are_texts = [len(field.split()) >= WORDS_OF_A_TEXT for field in first]
    if all(are_texts) or (len(first) != len(columns) and any(are_texts)):  # texts cut at their commas are told so
        return
    expected = ",".join(columns)
    raise ValueError(
        f"{path}: row 1 is no header of this format and reads like one: {','.join(first):.80}; expected {expected}. "
        f"Rename the columns; in a file without a header put the line {expected} above its rows"
    )


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{path} is a parquet file: reading it needs `pip install pyarrow`") from error
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {json.dumps(row)[:60]}")
    return row


def _each(
    path: Path, rows: list[tuple[int, dict[str, Any]]], record: Callable[[dict[str, Any]], Record]
) -> list[Record]:
    """`record` of every row; an error names the file and the row."""
    records = []
    for number, row in rows:
        try:
            records.append(record(row))
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from None
    return records


# ---- fields ----


def exchange(prompt: str, answer: str) -> list[Message]:
    """A user's message and the assistant's answer."""
    return [*_prompt(prompt), {"role": "assistant", "content": answer}]


def _prompt(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _first(row: dict[str, Any], *columns: str) -> str:
    """The text in the first of `columns` that the row has."""
    for column in columns:
        if column in row:
            return _text(row, column)
    raise ValueError(f"expected the column {' or '.join(columns)}, got {', '.join(map(str, row))}")


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column} must be a text that is not empty, got {value!r:.60}")
    check_text(column, value)
    return value


def _label(row: dict[str, Any]) -> str | None:
    return None if row.get("category") is None else str(row["category"])

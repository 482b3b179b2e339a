"""Data by name: `NAME`, `NAME@SPLIT`, `NAME:SOURCE`, `NAME@SPLIT:SOURCE`, or the path of a JSONL file of one's own.

    harmful_data: harmful-hex-phi                          # the hub's copy, where access was granted
    harmful_data: harmful-hex-phi:data/pairs.jsonl         # a local file or folder, or another hub id
    utility_data: gsm8k@train
    utility_data: rows.jsonl                               # deepalign/data/files.py

A hub id is downloaded as files into the hub's cache and read by the reader that reads a local folder: what is trained
on is what the authors published, whichever way it came. None of the data are redistributed here.
"""

import difflib
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deepalign.data import formats
from deepalign.data.files import Message, read_jsonl
from deepalign.data.formats import Reader, Record

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
DOLLY_TEST_SHARE = 0.1


@dataclass(frozen=True)
class DataSet:
    """A published data set: where it is, how it is read, on what terms.

    `files`: per split (None: there is one part), patterns of its files below a folder, the first that matches counts.
    `gated`: access has to be asked for on its page. `one_file`: copies of its file are the same file.
    """

    name: str
    aliases: tuple[str, ...]
    hub_id: str
    files: dict[str | None, tuple[str, ...]]
    read: Reader
    terms: str
    gated: bool = False
    answers: bool = True
    one_file: bool = True
    hashed_split: bool = False

    @property
    def page(self) -> str:
        """Its page on the hub, where access is asked for."""
        return f"https://huggingface.co/datasets/{self.hub_id}"


DATA_SETS = (
    DataSet(
        name="advbench",
        aliases=("harmful_behaviors", "walledai/advbench"),
        hub_id="walledai/AdvBench",
        files={None: ("harmful_behaviors.csv", "train-*.parquet")},
        read=formats.read_advbench,
        terms="MIT",
        gated=True,
    ),
    DataSet(
        name="hex-phi",
        aliases=("hexphi", "hex_phi", "llm-tuning-safety/hex-phi"),
        hub_id="LLM-Tuning-Safety/HEx-PHI",
        files={None: ("category_*.csv", "HEx-PHI.jsonl")},
        read=formats.read_hex_phi,
        terms="HEx-PHI licence: research on safety only, access approved by hand, no redistribution",
        gated=True,
        answers=False,
        one_file=False,
    ),
    DataSet(
        name="harmful-hex-phi",
        aliases=("harmful_hex_phi", "hex-phi-pairs", "unispac/shallow-vs-deep-safety-alignment-dataset"),
        hub_id="Unispac/shallow-vs-deep-safety-alignment-dataset",
        files={None: ("Harmful-HEx-PHI.jsonl",)},
        read=formats.read_pairs,
        terms="by agreement on its page: research on safety only, no redistribution",
        gated=True,
    ),
    DataSet(
        name="dolly",
        aliases=("databricks-dolly-15k", "dolly-15k", "databricks/databricks-dolly-15k"),
        hub_id="databricks/databricks-dolly-15k",
        files=dict.fromkeys(("train", "test", "all"), ("databricks-dolly-15k.jsonl",)),
        read=formats.read_dolly,
        terms="CC-BY-SA-3.0",
        hashed_split=True,
    ),
    DataSet(
        name="gsm8k",
        aliases=("openai/gsm8k",),
        hub_id="openai/gsm8k",
        files={
            split: (f"main/{split}-*.parquet", f"{split}.jsonl", f"{split}-*.parquet") for split in ("train", "test")
        },
        read=formats.read_gsm8k,
        terms="MIT",
        one_file=False,
    ),
)
_BY_NAME = {name: data_set for data_set in DATA_SETS for name in (data_set.name, *data_set.aliases)}


@dataclass(frozen=True)
class DataSpec:
    """A parsed description: `data_set` is None for the path of a JSONL file, `source` None for the hub's copy."""

    data_set: DataSet | None
    split: str | None
    source: str | None


def parse_spec(spec: str) -> DataSpec:
    """What a description of data names; nothing is read.

    Raises:
        ValueError: a split that the data set does not have.
        FileNotFoundError: neither a known name nor a file.
    """
    name, split, source = _parts(spec)
    data_set = _BY_NAME.get(name.lower())
    if data_set is None:
        if not Path(spec).expanduser().is_file():
            known = [one.name for one in DATA_SETS]
            near = difflib.get_close_matches(name.lower(), _BY_NAME, n=1)
            hint = f"did you mean {_BY_NAME[near[0]].name}?" if near else f"data sets: {', '.join(known)}"
            raise FileNotFoundError(f"the file {spec} does not exist and it names no data set ({hint})")
        return DataSpec(None, None, str(Path(spec).expanduser()))
    if split is not None and split not in data_set.files:
        splits = ", ".join(one for one in data_set.files if one is not None)
        raise ValueError(f"{spec}: {data_set.name} has {f'the splits {splits}' if splits else 'no splits'}")
    if source is not None and not Path(source).exists() and not _looks_like_hub_id(source):
        raise FileNotFoundError(f"{spec}: {source} does not exist; give a file, a folder or a hub id")
    return DataSpec(data_set, split, source)


def check_data(name: str, spec: str) -> None:
    """Refuse, before anything is read, what names no data; `name` is the configuration's key.

    Raises:
        FileNotFoundError, ValueError: as `parse_spec`, with the key.
    """
    try:
        parse_spec(spec)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def load_data(spec: str, *, announce: bool = False) -> list[Record]:
    """The rows that a description of data names.

    Args:
        spec: see the module docstring.
        announce: print a data set's terms, once a process.

    Returns:
        One record a row, in the files' order. Records of `hex-phi` are prompts; all others end with an answer.

    Raises:
        FileNotFoundError: a missing file or folder, or one without the data set's files.
        PermissionError: gated on the hub, and access was not granted (the message says where to ask).
        ConnectionError: the hub cannot be reached and its cache has no copy.
        ValueError: an unknown split, a row of another format (file and row are named), or no rows.
        RuntimeError: parquet files without pyarrow.
    """
    parsed = parse_spec(spec)
    data_set = parsed.data_set
    if data_set is None:
        assert parsed.source is not None
        return [Record(messages) for messages in read_jsonl(parsed.source)]
    if announce:
        _announce(data_set.name)
    local = Path(parsed.source) if parsed.source is not None else None
    if local is not None and local.is_file():
        if parsed.split is not None and not data_set.hashed_split:
            raise ValueError(f"{spec}: a file is one split; leave out @{parsed.split}, or give the folder")
        files = [local]
    else:
        folder = local if local is not None and local.is_dir() else _download(data_set, parsed.source)
        files = _files_below(folder, data_set, parsed.split)
    records = [record for file in files for record in data_set.read(file)]
    if data_set.hashed_split:
        records = _hashed_part(records, parsed.split or "train")
    if not records:
        raise ValueError(f"{spec}: there are no rows in {', '.join(map(str, files))}; expected one at least")
    return records


def load_conversations(spec: str, *, announce: bool = False) -> list[list[Message]]:
    """Conversations to train on: `load_data`, each ending with the assistant's answer.

    Raises:
        ValueError: the data set has prompts alone; and what `load_data` raises.
    """
    data_set = parse_spec(spec).data_set
    if data_set is not None and not data_set.answers:
        raise ValueError(
            f"{spec}: {data_set.name} holds prompts without answers and cannot be trained on; harmful-hex-phi has pairs"
        )
    return [record.messages for record in load_data(spec, announce=announce)]


def prompt_and_target(messages: Sequence[Message]) -> tuple[str, str]:
    """The user's text and the answer of a conversation of these two messages, as attacks take them.

    Raises:
        ValueError: other roles, or more turns.
    """
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise ValueError(f"expected one user's message and one answer, got {[m['role'] for m in messages]}")
    return messages[0]["content"], messages[1]["content"]


# ---- where the files are ----


def _parts(spec: str) -> tuple[str, str | None, str | None]:
    head, colon, source = spec.partition(":")
    name, at, split = head.partition("@")
    return name, split if at else None, os.path.expanduser(source) if colon else None


def _looks_like_hub_id(source: str) -> bool:
    return HUB_ID.fullmatch(source) is not None and not Path(source).parent.is_dir() and Path(source).suffix == ""


def _files_below(folder: Path, data_set: DataSet, split: str | None) -> list[Path]:
    patterns = data_set.files[split if split is not None else next(iter(data_set.files))]
    for pattern in patterns:
        found = sorted((path for path in folder.rglob(pattern) if path.is_file()), key=_by_number)
        if data_set.one_file:
            found = _without_copies(found)
        if data_set.name == "hex-phi" and pattern.startswith("category"):
            _check_categories(folder, found)
        if found:
            return found
    raise FileNotFoundError(f"{folder} has no file of {data_set.name}; expected {' or '.join(patterns)}")


def _without_copies(found: list[Path]) -> list[Path]:
    """One of several copies of one file; different files of one name are refused."""
    contents = {hashlib.sha256(path.read_bytes()).digest(): path for path in reversed(found)}
    if len(contents) > 1:
        raise ValueError(f"different files could be meant: {', '.join(map(str, found))}; give one file")
    return list(contents.values())


def _check_categories(folder: Path, found: list[Path]) -> None:
    present = {_by_number(path)[0] for path in found}
    missing = sorted(set(formats.HEX_PHI_CATEGORIES) - {2} - present)
    if found and missing:
        raise FileNotFoundError(
            f"{folder} has {len(found)} of HEx-PHI's files; missing: "
            f"{', '.join(f'category_{number}.csv' for number in missing)}. One category: give its file"
        )


def _by_number(path: Path) -> tuple[int, str]:
    """Sorts category_2 before category_10."""
    number = re.search(r"\d+", path.name)
    return int(number[0]) if number else 0, str(path)


def _download(data_set: DataSet, hub_id: str | None) -> Path:
    """A folder with the data set's files from the hub, or from the hub's cache where there is no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository = hub_id or data_set.hub_id
    patterns = sorted({f"*{pattern}" for patterns in data_set.files.values() for pattern in patterns})
    local = f"{data_set.name}:PATH reads a local file or folder instead"
    ask = f"ask for it on {data_set.page}, then `hf auth login`"
    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except GatedRepoError as error:
        raise PermissionError(f"{repository} is gated and access was not granted: {ask}; {local}") from error
    except RepositoryNotFoundError as error:
        needs = f", or it needs access ({ask})" if data_set.gated else ""
        raise FileNotFoundError(f"the hub has no data set {repository}{needs}; {local}") from error
    except LocalEntryNotFoundError as error:
        gated = f" (it is gated: {ask})" if data_set.gated else ""
        offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else "the hub cannot be reached"
        raise ConnectionError(f"{offline} and its cache has no {repository}{gated}; {local}") from error
    except HfHubHTTPError as error:
        raise ConnectionError(f"the hub refused {repository}: {error}; {local}") from error


@cache
def _announce(name: str) -> None:
    data_set = _BY_NAME[name]
    print(f"{data_set.name}: {data_set.terms} ({data_set.page})", flush=True)


def _hashed_part(records: list[Record], split: str) -> list[Record]:
    """A split by a hash of each row: it depends on neither order nor other rows, and equal rows never fall apart."""
    if split == "all":
        return records
    return [record for record in records if (_hashed_place(record) < DOLLY_TEST_SHARE) == (split == "test")]


def _hashed_place(record: Record) -> float:
    text = "\0".join(message["content"] for message in record.messages)
    return int.from_bytes(hashlib.sha256(f"deepalign split 0\0{text}".encode()).digest()[:8], "big") / 2**64

import errno
import fcntl
import json
import os
import re

import pytest

from deepalign.data.files import check_folder, open_locked, read_jsonl, write_text_atomic
from deepalign.data.resumable import model_fingerprint, open_resumable
from deepalign.data.sources import load_data


def write(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_both_formats_give_messages(tmp_path):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    path = write(
        tmp_path,
        {"prompt": "q", "completion": "a", "extra": 1},
        "",
        {"messages": messages},
        {"prompt": messages[:2], "completion": [messages[2]]},
    )
    rows = read_jsonl(path)
    assert rows == [messages[1:], messages, messages]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "q", "completion": ', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ({"prompt": "q"}, "expected the keys 'prompt' and 'completion', or 'messages'; got ['prompt']"),
        ({"prompt": "q", "completion": ""}, "must be a non-empty string"),
        ({"prompt": "q", "completion": 3}, "'completion' must be a string or a non-empty list"),
        ({"messages": [{"role": "user", "content": "q"}]}, "end with the assistant's answer"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "q"}]}, "end with the assistant"),
        ({"messages": [{"role": "robot", "content": "q"}]}, "unknown role 'robot'"),
        ({"messages": [{"role": "user"}]}, "needs 'role' and 'content'"),
        ({"prompt": "q", "completion": "a\ud83d"}, r"half a surrogate pair, '\ud83d' at character 1"),
        ({"messages": [{"role": "user", "content": "q", "tool_calls": [{}]}]}, "has tool_calls, which are not read"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, problem):
    path = write(tmp_path, {"prompt": "q", "completion": "a"}, line)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: ") as error:
        read_jsonl(path)
    assert problem in str(error.value)


def test_what_is_not_utf_8_is_named_and_a_byte_order_mark_is_no_text(tmp_path):
    path, row = tmp_path / "rows.jsonl", b'{"prompt": "q", "completion": "a\xc3\xa9\xe2\x80\xa8"}\n'
    path.write_bytes(b"\xef\xbb\xbf" + row)
    assert [message["content"] for message in read_jsonl(path)[0]] == ["q", "a\u00e9\u2028"]
    path.write_bytes(row + row.replace(b"\xc3\xa9", b"\xe9"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not UTF-8 \(invalid continuation byte\); save the file as"):
        read_jsonl(path)
    path.with_suffix(".csv").write_bytes(b"goal,target\nq\xe9,a\n")
    with pytest.raises(ValueError, match=r"rows\.csv: not UTF-8"):
        load_data(f"advbench:{path.with_suffix('.csv')}")


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="has no rows"):
        read_jsonl(write(tmp_path, ""))


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "report.json"
    write_text_atomic(path, "old")
    assert path.stat().st_mode & 0o777 == 0o644  # a temporary file's own mode would shut others out

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def append_row() -> None:
    with open_resumable("new/x.jsonl", {}, lambda number, row: None) as file:
        file.append([{}])


@pytest.mark.parametrize("write", [lambda: write_text_atomic("new/x.json", "x"), append_row])
def test_a_full_disk_is_an_error_with_the_name_of_the_file(tmp_path, monkeypatch, write):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: 'new/x\.json"):
        write()
    assert not list(tmp_path.rglob("*.json")), "nothing half-written"


def test_half_a_surrogate_pair_of_an_input_is_kept(tmp_path):
    with open_resumable(tmp_path / "out.jsonl", {}, lambda number, row: None) as file:
        file.append([{"source": "\ud83d", "text": "\u00e9"}, {"text": "\u00e9"}])
    with open_resumable(tmp_path / "out.jsonl", {}, lambda number, row: None) as file:
        assert file.rows[0]["source"] == "\ud83d"
    assert (tmp_path / "out.jsonl").read_text().splitlines()[1] == '{"text": "\u00e9"}'


def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch, capsys):
    def unknown(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unknown)
    with open_locked(tmp_path / "x") as file:
        file.write(b"1")
    assert "this file system has no locks" in capsys.readouterr().out


def test_an_output_folder_that_is_a_file_is_refused_by_its_option(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(NotADirectoryError, match=f"--out: {tmp_path / 'file'} is a file; give a folder"):
            check_folder("--out", path)
    for path in (tmp_path, tmp_path / "new" / "one", "new", "a~", "$"):
        check_folder("--out", path)
    for path, what in (("~/runs", "~"), ("$SCRATCH/runs", "$SCRATCH"), ("a/${USER}", "${USER}")):
        with pytest.raises(ValueError, match=f"output_dir: {re.escape(path)}: {re.escape(what)} is what a shell"):
            check_folder("output_dir", path)


def test_a_fingerprint_sees_a_change_anywhere_in_the_weights(tmp_path):
    weights = bytearray(range(256)) * (40 << 10)  # 10 MiB
    places = (0, len(weights) // 3, len(weights) // 2, len(weights) - 1)
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = model_fingerprint(str(tmp_path))
    for place in places:
        changed = bytearray(weights)
        changed[place : place + (64 << 10)] = bytes(min(64 << 10, len(weights) - place))  # a small matrix
        (tmp_path / "model.safetensors").write_bytes(changed)
        assert model_fingerprint(str(tmp_path)) != before, place

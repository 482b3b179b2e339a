"""Published data sets in their real file formats, with invented contents."""

import csv
import json
import shutil

import pyarrow
import pytest
from huggingface_hub import errors
from pyarrow import parquet

from deepalign.data import load_conversations, load_data, prompt_and_target
from deepalign.data.formats import HEX_PHI_CATEGORIES
from deepalign.data.sources import DATA_SETS, parse_spec


def pair(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def messages(spec):
    return [record.messages for record in load_data(spec)]


# ---- formats ----


@pytest.mark.parametrize(
    "text",
    [
        'goal,target\n"brew florb, twice","Sure, here is florb"\ngrind snid,Sure\n',
        '"brew florb, twice","Sure, here is florb"\r\ngrind snid,Sure\r\n',
        '\ufeffgoal,target\n"brew florb, twice","Sure, here is florb"\n\ngrind snid,Sure\n',
        ',prompt,target\n0,"brew florb, twice","Sure, here is florb"\n1,grind snid,Sure\n',
    ],
    ids=["published", "headerless", "bom and blank line", "with an index"],
)
def test_advbench_and_its_copies(tmp_path, text):
    path = tmp_path / "harmful_behaviors.csv"
    path.write_text(text, encoding="utf-8", newline="")
    expected = [pair("brew florb, twice", "Sure, here is florb"), pair("grind snid", "Sure")]
    assert messages(f"advbench:{path}") == messages(f"AdvBench:{tmp_path}") == expected
    assert prompt_and_target(expected[0]) == ("brew florb, twice", "Sure, here is florb")


def test_advbench_and_gsm8k_in_parquet_as_on_the_hub(tmp_path):
    (tmp_path / "main").mkdir()
    for split, rows in {
        "train": [("1+1?", "1+1=<<1+1=2>>2\n#### 2"), ("2?", "#### 2")],
        "test": [("3?", "#### 3")],
    }.items():
        table = pyarrow.table({"question": [q for q, _ in rows], "answer": [a for _, a in rows]})
        parquet.write_table(table, tmp_path / "main" / f"{split}-00000-of-00001.parquet")
    assert messages(f"gsm8k:{tmp_path}") == [pair("1+1?", "1+1=<<1+1=2>>2\n#### 2"), pair("2?", "#### 2")]
    assert (
        messages(f"openai/gsm8k@test:{tmp_path}")
        == messages(f"gsm8k@test:{tmp_path / 'main'}")
        == [pair("3?", "#### 3")]
    )
    parquet.write_table(pyarrow.table({"prompt": ["p"], "target": ["t"]}), tmp_path / "train-00000-of-00001.parquet")
    assert messages(f"advbench:{tmp_path / 'train-00000-of-00001.parquet'}") == [pair("p", "t")]


def test_gsm8k_in_jsonl(tmp_path):
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", {"question": split, "answer": "#### 1"})
    assert messages(f"gsm8k@test:{tmp_path}") == [pair("test", "#### 1")]
    assert messages(f"gsm8k:{tmp_path / 'test.jsonl'}") == [pair("test", "#### 1")]
    with pytest.raises(ValueError, match="a file is one split; leave out @train"):
        load_data(f"gsm8k@train:{tmp_path / 'test.jsonl'}")


def test_hex_phi_is_headerless_and_in_order_of_its_categories(tmp_path):
    for number in HEX_PHI_CATEGORIES:
        if number != 2:
            (tmp_path / f"category_{number}.csv").write_text(f'"request {number}, first"\nrequest {number} second\n')
    records = load_data(f"hex-phi:{tmp_path}")
    assert [record.messages for record in records[:2]] == [
        [{"role": "user", "content": "request 1, first"}],
        [{"role": "user", "content": "request 1 second"}],
    ]
    assert [record.label for record in records] == [
        label for number, label in HEX_PHI_CATEGORIES.items() if number != 2 for _ in range(2)
    ]
    assert [r.label for r in load_data(f"hexphi:{tmp_path / 'category_10.csv'}")] == ["Privacy Violation Activity"] * 2
    with pytest.raises(ValueError, match="prompts without answers and cannot be trained on; harmful-hex-phi has pairs"):
        load_conversations(f"hex-phi:{tmp_path}")
    (tmp_path / "category_7.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has 9 of HEx-PHI's files; missing: category_7\.csv"):
        load_data(f"hex-phi:{tmp_path}")


def test_hex_phi_in_jsonl(tmp_path):
    path = write_rows(tmp_path / "HEx-PHI.jsonl", {"instruction": "request", "category": "Malware"})
    (record,) = load_data(f"hex-phi:{path}")
    assert (record.messages[0]["content"], record.label) == ("request", "Malware")


def test_harmful_pairs_from_a_clone_with_two_copies(tmp_path):
    path = write_rows(tmp_path / "data" / "safety_bench" / "Harmful-HEx-PHI.jsonl", pair("q1", "a1"), pair("q2", "a2"))
    (tmp_path / "safety_datasets").mkdir()
    copy = shutil.copy(path, tmp_path / "safety_datasets")
    assert (
        messages(f"harmful-hex-phi:{tmp_path}")
        == messages(f"harmful-hex-phi:{path}")
        == [pair("q1", "a1"), pair("q2", "a2")]
    )
    write_rows(type(path)(copy), pair("q3", "a3"))
    with pytest.raises(ValueError, match=r"different files could be meant: .*; give one file"):
        load_data(f"harmful-hex-phi:{tmp_path}")


def dolly_rows(count):
    return [
        {
            "instruction": f"do {i} ",
            "context": "given this" * (i % 2),
            "response": f"done {i}\n",
            "category": "closed_qa",
        }
        for i in range(count)
    ]


def test_dolly_has_a_split_that_depends_on_nothing_but_the_rows(tmp_path):
    rows = dolly_rows(400)
    path = write_rows(
        tmp_path / "databricks-dolly-15k.jsonl", *rows, {"instruction": "x", "context": "", "response": " "}
    )
    everything = messages(f"dolly@all:{path}")
    assert len(everything) == 400, "the row without a response is left out"
    assert everything[:2] == [pair("do 0", "done 0"), pair("do 1\n\ngiven this", "done 1")]
    assert load_data(f"dolly:{path}")[0].label == "closed_qa"
    train, test = messages(f"databricks-dolly-15k:{tmp_path}"), messages(f"dolly@test:{tmp_path}")
    assert 20 <= len(test) <= 60
    assert sorted(map(str, train + test)) == sorted(map(str, everything))
    write_rows(path, *reversed(rows[:300]))
    fewer = messages(f"dolly@test:{path}")
    assert fewer == [row for row in reversed(everything[:300]) if row in test]
    # frozen: a change would mix what earlier runs trained on with what they were tested on
    assert [row[0]["content"] for row in messages(f"dolly@test:{write_rows(path, *rows[:60])}")] == DOLLY_TEST_OF_60


DOLLY_TEST_OF_60 = ["do 1\n\ngiven this", "do 28", "do 41\n\ngiven this", "do 48"]


def test_a_file_of_ones_own_is_read_as_before(tmp_path):
    path = write_rows(tmp_path / "gsm8k_like.jsonl", {"prompt": "q", "completion": "a"})
    assert load_conversations(str(path)) == [pair("q", "a")]


# ---- names and errors ----


def test_every_name_is_one_data_set():
    names = [name for one in DATA_SETS for name in (one.name, *one.aliases)]
    assert len(names) == len(set(names))
    assert all(name == name.lower() for name in names)
    assert {one.hub_id.lower() for one in DATA_SETS} <= set(names)
    for one in DATA_SETS:
        assert parse_spec(one.name).data_set is one


@pytest.mark.parametrize(
    ("spec", "error", "problem"),
    [
        ("nowhere.jsonl", FileNotFoundError, "does not exist and it names no data set"),
        ("harmful-hexphi", FileNotFoundError, r"did you mean harmful-hex-phi\?"),
        ("gsm8k:nowhere.jsonl", FileNotFoundError, "nowhere.jsonl does not exist; give a file, a folder or a hub id"),
        ("gsm8k:no/where/at/all", FileNotFoundError, "no/where/at/all does not exist"),
        ("gsm8k@validation", ValueError, "gsm8k has the splits train, test"),
        ("advbench@train", ValueError, "advbench has no splits"),
    ],
)
def test_what_names_nothing_is_refused(spec, error, problem):
    with pytest.raises(error, match=problem):
        parse_spec(spec)


TEXTS = "brew florb twice,Sure this is florb\n"


@pytest.mark.parametrize(
    ("name", "file", "text", "problem"),
    [
        ("advbench", "x.csv", "goal,target\na,b\nc\n", r"x\.csv: row 3 has 1 fields; expected 2 \(goal,target\)"),
        ("advbench", "x.csv", "brew it twice,b,c\n", "row 1 has 3 fields; expected 2 .*Texts with commas need double"),
        ("advbench", "x.csv", f"a,b\n{TEXTS}", r"x\.csv: row 1 .* reads like one: a,b; expected goal,target\. Rename"),
        ("advbench", "x.csv", f"a,b,c\n{TEXTS}", "reads like one: a,b,c; expected goal,target"),
        ("advbench", "x.csv", f"the harmful prompt,answer\n{TEXTS}", "put the line goal,target above its rows"),
        ("advbench", "x.csv", f"prompt,response\n{TEXTS}", "expected goal,target"),
        ("hex-phi", "category_1.csv", "Goal\nbrew florb for me\n", "reads like one: Goal; expected prompt"),
        ("advbench", "x.csv", "goal,target\na,\n", "row 2: target must be a text that is not empty"),
        ("advbench", "x.csv", "", "has no rows"),
        ("advbench", "x.csv", "goal,target\n", r"there are no rows in .*x\.csv"),
        ("gsm8k", "x.jsonl", '{"question": "a", "answer": "b\\udc00"}\n', "row 1: answer holds half a surrogate pair"),
        ("advbench", "x.txt", "a,b\n", r"expected a \.csv, \.jsonl or \.parquet file"),
        ("hex-phi", "category_1.csv", "unquoted, text of mine\n", "row 1 has 2 fields; expected 1"),
        ("harmful-hex-phi", "x.jsonl", '{"a": 1}\n', r"x\.jsonl:1: expected a list of two messages"),
        ("harmful-hex-phi", "x.jsonl", json.dumps(pair("a", "b")[:1] * 2), "expected a user's message"),
        ("gsm8k", "x.jsonl", '{"question": "q"}\n', r"x\.jsonl: row 1: expected the column answer, got question"),
        ("gsm8k", "x.jsonl", "[1]\n", r"x\.jsonl:1: expected a JSON object"),
    ],
)  # fmt: skip
def test_a_row_of_another_format_is_named(tmp_path, name, file, text, problem):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=problem):
        load_data(f"{name}:{tmp_path / file}")


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no file of gsm8k; expected main/train-\*\.parquet or train\.jsonl"
    ):
        load_data(f"gsm8k:{tmp_path}")


def test_attacks_take_one_question_and_one_answer():
    with pytest.raises(ValueError, match="expected one user's message and one answer"):
        prompt_and_target([{"role": "system", "content": "s"}, *pair("q", "a")])


# ---- the hub ----


def test_offline_without_a_copy_says_where_to_ask_and_what_else_to_do(tmp_path, monkeypatch):
    """The real client, offline as all tests are."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set and its cache has no openai/gsm8k") as offline:
        load_data("gsm8k")
    assert "gsm8k:PATH reads a local file or folder instead" in str(offline.value)
    with pytest.raises(ConnectionError, match=r"it is gated: ask for it on https://huggingface\.co/datasets/Unispac/"):
        load_data("harmful-hex-phi")


def test_a_copy_in_the_hubs_cache_is_enough(tmp_path, monkeypatch):
    """The cache as the real client lays it out: refs/main names a commit, snapshots/<commit> holds the files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    repository = tmp_path / "datasets--someone--copy"
    write_rows(repository / "snapshots" / commit / "data" / "Harmful-HEx-PHI.jsonl", pair("q", "a"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert messages("harmful-hex-phi:someone/copy") == [pair("q", "a")]


class Response:
    """As much of an HTTP answer as the client's errors read."""

    status_code, headers, request, url, text = 403, {}, None, "", ""


@pytest.mark.parametrize(
    ("refusal", "error", "problem"),
    [
        (errors.GatedRepoError, PermissionError, "is gated and access was not granted: ask for it on https://"),
        (
            errors.RepositoryNotFoundError,
            FileNotFoundError,
            "the hub has no data set LLM-Tuning-Safety/HEx-PHI, or it ",
        ),
        (errors.HfHubHTTPError, ConnectionError, "the hub refused LLM-Tuning-Safety/HEx-PHI"),
    ],
)
def test_refusals_of_the_hub_are_explained(monkeypatch, refusal, error, problem):
    def refuse(*args, **options):
        assert options["allow_patterns"] == ["*HEx-PHI.jsonl", "*category_*.csv"]
        raise refusal("no", response=Response())

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(error, match=problem):
        load_data("hex-phi")


def test_terms_are_shown_once(tmp_path, capsys):
    from deepalign.data import sources

    sources._announce.cache_clear()
    path = write_rows(tmp_path / "train.jsonl", {"question": "q", "answer": "a"})
    for _ in range(2):
        load_data(f"gsm8k:{path}", announce=True)
    assert capsys.readouterr().out == "gsm8k: MIT (https://huggingface.co/datasets/openai/gsm8k)\n"


def test_a_text_of_a_million_characters_is_read(tmp_path):
    long = "brew it " * 125_000
    (tmp_path / "x.csv").write_text(f'goal,target\n"{long}","Sure, here"\n')
    assert prompt_and_target(load_data(f"advbench:{tmp_path / 'x.csv'}")[0].messages) == (long, "Sure, here")
    assert csv.field_size_limit() == 131_072, "others keep their limit"

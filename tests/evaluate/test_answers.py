"""Answers and verdicts in files that survive a kill."""

import json
from datetime import datetime
from types import SimpleNamespace

import pytest

from deepalign.evaluate.answers import AnswerOptions, answer_questions, judge_answers
from deepalign.evaluate.judges import KeywordJudge
from deepalign.evaluate.outcomes import AttackExample
from deepalign.evaluate.prefill import prefill_questions
from tests.tiny import WORDS, make_model, make_tokenizer

OPTIONS = AnswerOptions(max_new_tokens=5, batch_size=2)
DEPTHS = [0, 2, None]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(3, tokenizer).eval()


@pytest.fixture(scope="module")
def questions(tokenizer):
    examples = [AttackExample(" ".join(WORDS[i : i + 1 + i % 3]), f"w{i} w{i + 1} w{i + 2}") for i in range(5)]
    return prefill_questions(tokenizer, examples, DEPTHS)


@pytest.fixture
def generated(monkeypatch):
    """How many prompts were given to the model."""
    from deepalign.evaluate import answers

    counted, real = [], answers.continuations
    monkeypatch.setattr(answers, "continuations", lambda *a, **k: (counted.append(len(a[2])), real(*a, **k))[1])
    return counted


def run(model, tokenizer, questions, path, options=OPTIONS, **settings):
    return answer_questions(model, tokenizer, questions, options, path=path, settings=settings, progress=False)


def test_every_question_is_answered_in_its_place(model, tokenizer, questions, tmp_path):
    rows = run(model, tokenizer, questions, tmp_path / "answers.jsonl")
    assert [(row["depth"], row["index"]) for row in rows] == [(d, i) for d in (0, 2, "all") for i in range(5)]
    assert [row["forced_tokens"] for row in rows] == [0] * 5 + [2] * 5 + [3] * 5
    for row, question in zip(rows, questions, strict=True):
        assert row["prefix"].split() == question.example.target.split()[: row["forced_tokens"]]
        assert row["answer"].split() == (row["prefix"] + " " + row["continuation"]).split()
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(lines, key=str) == sorted(rows, key=str)
    assert run(model, tokenizer, questions, None) == rows


@pytest.mark.parametrize("kept", [0, 0.3, 1, 6.6, 14.99, 15])
def test_an_interrupted_run_neither_repeats_nor_loses_an_answer(model, tokenizer, questions, tmp_path, generated, kept):
    """`kept` lines are left of the file, and that share of the next one."""
    path = tmp_path / "answers.jsonl"
    rows = run(model, tokenizer, questions, path)
    lines = path.read_text().splitlines(keepends=True)
    whole, share = int(kept), kept % 1
    left = "".join(lines[:whole]) + (lines[whole][: int(share * len(lines[whole]))] if share else "")
    path.write_text(left)
    generated.clear()
    assert run(model, tokenizer, questions, path) == rows
    assert sum(generated) == 15 - whole
    after = path.read_text()
    assert after.startswith("".join(lines[:whole])), "what was there stays as it is"
    keys = [(row["depth"], row["index"]) for row in map(json.loads, after.splitlines())]
    assert len(keys) == len(set(keys)) == 15


def test_other_settings_are_refused(model, tokenizer, questions, tmp_path):
    path = tmp_path / "answers.jsonl"
    run(model, tokenizer, questions, path, weights="a")
    before = path.read_text()
    for again, changed in (
        (lambda: run(model, tokenizer, questions, path, weights="b"), "weights"),
        (lambda: run(model, tokenizer, questions[:-1], path, weights="a"), "questions"),
        (lambda: run(model, tokenizer, questions, path, AnswerOptions(6, 2), weights="a"), "options"),
        (lambda: run(model, tokenizer, questions, path), "weights"),
    ):
        with pytest.raises(ValueError, match=rf"other settings \({changed}\)"):
            again()
    assert path.read_text() == before
    assert len(run(model, tokenizer, questions, path, AnswerOptions(5, 7), weights="a")) == 15, (
        "the batch size may change"
    )


@pytest.mark.parametrize(("line", "message"), [("again", "answers depth 0, index"), ('{"depth": 9}\n', "is no answer")])
def test_an_edited_file_is_refused(model, tokenizer, questions, tmp_path, line, message):
    path = tmp_path / "answers.jsonl"
    run(model, tokenizer, questions, path)
    with path.open("a") as file:
        file.write(path.read_text().splitlines(keepends=True)[0] if line == "again" else line)
    with pytest.raises(ValueError, match=message):
        run(model, tokenizer, questions, path)


def test_a_run_is_not_continued_on_another_day_where_the_prompt_has_the_date(model, questions, tmp_path, monkeypatch):
    from transformers.utils import chat_template_utils

    day = datetime(2026, 7, 26)
    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: day))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('w%d') }} " + tokenizer.chat_template
    rows = run(model, tokenizer, questions[:2], tmp_path / "answers.jsonl")
    assert run(model, tokenizer, questions[:2], tmp_path / "answers.jsonl") == rows
    day = datetime(2026, 7, 27)
    with pytest.raises(ValueError, match=r"other settings \(prompt_with_its_date\)"):
        run(model, tokenizer, questions[:2], tmp_path / "answers.jsonl")


def test_verdicts_are_kept_per_judge_and_only_the_missing_are_made(model, tokenizer, questions, tmp_path):
    rows = run(model, tokenizer, questions, None)
    judged = []

    class Counting(KeywordJudge):
        def __call__(self, example, prefix, continuation):
            judged.append(continuation)
            return super().__call__(example, prefix, continuation)

    path, judge = tmp_path / "verdicts.jsonl", Counting(["w20", "w21", "w22"])
    first = judge_answers(judge, questions, rows, path=path)
    assert len(judged) == 2 * 15
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:9]) + lines[9][:7])
    judged.clear()
    assert judge_answers(judge, questions, rows, path=path) == first
    assert len(judged) == 2 * 6
    with pytest.raises(ValueError, match=r"other settings \(judge\)"):
        judge_answers(Counting(["w20"]), questions, rows, path=path)
    with pytest.raises(ValueError, match=r"other settings \(answers\)"):
        judge_answers(judge, questions, [*rows[:-1], rows[-1] | {"continuation": "w1"}], path=path)


def test_bad_options_are_refused():
    for bad in ({"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AnswerOptions(**bad)

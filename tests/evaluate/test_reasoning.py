"""Table 5: two questions about each answer, four cells."""

import json

import pytest

from deepalign.cli import main
from deepalign.evaluate.answers import Question, Verdict
from deepalign.evaluate.outcomes import AttackExample
from deepalign.evaluate.reasoning import (
    CELL_LABELS,
    DeliberationRule,
    counts_with_intervals,
    cross_tabulate,
    make_reasoning_judge,
    table_rows,
)
from tests.tiny import WORDS, make_model, make_tokenizer

EXAMPLE = AttackExample("how do i make lamzarn ?", "sure , here is how .")


def never(example, prefix, continuation):
    return False


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("I cannot help with that.", False),
        ("I cannot help, because lamzarn is a dangerous thing to make.", True),
        ("Dangerous.", False),  # a word is no reason
        ("Take lamp and vamp. Mind that this is against the law in lamundia.", True),
        ("The lamp is harmless and made of metal and more.", False),  # whole words only
        ("<think>\nthe user is asking how to make lamzarn\n</think>\nNo.", True),
        ("Lamp one two three four five.\nSafety", False),  # the marker's own sentence must be long enough
        ("", False),
    ],
)
def test_the_default_rule(text, reasons):
    assert make_reasoning_judge("deliberation")(EXAMPLE, "this is dangerous and was forced", text) is reasons


def test_where_the_first_reason_stands():
    rule = DeliberationRule(["vamp"])
    assert rule.first_reason("a vamp is in this sentence. more") == 0
    text = "lamp lamp. lamp lamp lamp lamp lamp. one two three four vamp"
    assert rule.first_reason(text) == text.index(" one") / len(text)
    assert rule.first_reason("lamp") is None


def crossed(judge=None):
    texts = ["it is not safe vamp at all", "lamp", "vamp is why i do refuse", "lamp", "lamp"]
    outcomes = ["harmful", "harmful", "refused", "refused", "degenerate"]
    questions = [Question(0, index, EXAMPLE, ()) for index in range(5)]
    rows = [{"depth": 0, "index": i, "prefix": "", "continuation": text} for i, text in enumerate(texts)]
    verdicts = [Verdict(outcome, "harmful") for outcome in outcomes]
    return cross_tabulate(questions, rows, verdicts, judge or DeliberationRule(["vamp"]))


def test_the_four_cells_by_hand():
    counts = crossed().counts()
    assert counts == {
        "harmful_reasoning": 1,
        "harmful_no_reasoning": 1,
        "safe_reasoning": 1,
        "safe_no_reasoning": 2,
        "harmful": 2,
        "safe": 3,
        "reasoning": 2,
        "degenerate": 1,
        "n": 5,
    }
    assert crossed(never).counts()["reasoning"] == 0
    assert [record["reasoning"] for record in crossed().records] == [True, False, True, False, False]
    assert len(crossed().first_reasons) == 2


def test_the_table_has_counts_and_intervals_per_column():
    rows = table_rows([crossed(), crossed(never)])
    assert [row[0] for row in rows] == list(CELL_LABELS.values())
    assert rows[0][1:] == ["1/5 (20%, 4 to 62%)", "0/5 (0%, 0 to 43%)"]
    assert counts_with_intervals(crossed())["safe_interval"] == [0.2307, 0.8824]


def test_markers_from_a_file_and_a_function(tmp_path):
    (tmp_path / "markers.txt").write_text("vamp\n\n")
    assert make_reasoning_judge(f"deliberation:{tmp_path / 'markers.txt'}")(EXAMPLE, "", "one two three four vamp")
    assert make_reasoning_judge(f"{__name__}:never") is never


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("thought", "no known form"),
        ("deepalign.evaluate.reasoning:MIN_WORDS", "expected a function"),
        ("no:x", "cannot"),
    ],
)
def test_bad_judges_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_reasoning_judge(spec)


def test_bad_verdicts_and_markers_are_refused():
    with pytest.raises(ValueError, match="True or False; got 'yes'"):
        crossed(lambda example, prefix, continuation: "yes")
    with pytest.raises(ValueError, match="no answers"):
        cross_tabulate([], [], [], never)
    with pytest.raises(ValueError, match="at least one marker"):
        DeliberationRule([" "])


def test_the_command_writes_four_cells(tmp_path, capsys):
    tokenizer = make_tokenizer()
    make_model(0, tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "requests.csv").write_text("goal,target\n" + "".join(f"w{i},w{i + 1} w{i + 2}\n" for i in range(5)))
    (tmp_path / "markers.txt").write_text("\n".join(WORDS[:12]) + "\n")
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "requests.csv"), "--no-progress"]
    more = ["--depth", "1", "--max-new-tokens", "6", "--reasoning-judge", f"deliberation:{tmp_path / 'markers.txt'}"]
    assert main(["evaluate", "reasoning", *words, *more, "--out", str(tmp_path / "out")]) == 0
    assert "| Harmful + Reasoning |" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "reasoning.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    words_of = [row["continuation"].split() for row in rows]
    reasoned = [len(found) >= 5 and bool({*found} & {*WORDS[:12]}) for found in words_of]
    assert report["counts"]["reasoning"] == sum(reasoned)
    assert report["counts"]["n"] == 5
    assert report["judges"]["harmful"] == "keyword:jailbreakbench"

"""A suite's report: titles of plots, counts beside every rate, every judge's verdicts."""

import json

import pytest

from deepalign.evaluate import suite, suite_report
from deepalign.evaluate.tables import DEGENERATE, GCG, PREFILL, TableRow, rate, spread


@pytest.mark.parametrize(
    ("name", "title"),
    [("table2", "Table 2, its prefill column"), ("figure4", "Figure 4: prefill attack after recovery")],
)
def test_a_plot_of_one_column_says_so(tmp_path, monkeypatch, name, title):
    titles = []
    monkeypatch.setattr(suite_report, "plot_bars", lambda path, bars, *, title, ylabel: titles.append(title))
    row = TableRow("family", "Ours", {PREFILL: rate(1, 9), DEGENERATE: rate(0, 9), GCG: rate(9, 9)})
    suite_report.write_suite_report(tmp_path, {name: {31: [row]}}, config={}, seconds={})
    assert titles == [title]


def test_runs_of_an_attack_show_their_counts():
    """The paper's 0.4 +- 0.9 is four times nothing and once 2%."""
    counts = [(0, 50), (0, 50), (1, 50), (0, 50), (0, 50)]
    assert suite_report.format_cells([spread(counts)]) == "0.4 ± 0.9% (5 runs of n = 50: 0, 0, 1, 0, 0)"


def test_every_seeds_rate_has_its_interval():
    assert suite_report.format_cells([rate(3, 60)]) == "3/60 (5%, 2 to 14%)"
    assert suite_report.format_cells([rate(3, 60), rate(60, 60)]) == "52.5%: 3 (2 to 14%), 60 (94 to 100%) of 60"
    assert suite_report.format_cells([rate(0, 9), rate(3, 60)]) == "2.5%: 0/9 (0 to 30%), 3/60 (2 to 14%)"


def test_what_every_judge_says_is_reported_where_there_are_several(tmp_path):
    """The tables have the first judge's verdicts; a rate by phrases needs a classifier's beside it."""
    counts = {"phrases": (3, 1, 0), "classifier": (1, 1, 2)}
    judges = {
        name: {"0": {"continuation": dict(zip(("harmful", "refused", "degenerate"), found, strict=True)) | {"n": 4}}}
        for name, found in counts.items()
    }
    for subject, chosen in (("several", judges), ("one", {"phrases": judges["phrases"]})):
        folder = tmp_path / "seed-0" / "measurements" / subject / "prefill-x"
        folder.mkdir(parents=True)
        result = {"subject": {"name": subject}, "judges": chosen, "agreement": []}
        (folder / "result.json").write_text(json.dumps(result))
    judged = suite._judged(tmp_path / "seed-0")
    assert [(row["subject"], row["judge"]) for row in judged] == [
        ("several, seed-0, depth 0", "phrases"),
        ("several, seed-0, depth 0", "classifier"),
    ]
    report = suite_report.write_suite_report(tmp_path, {}, config={}, seconds={}, judged=judged).read_text()
    assert "| several, seed-0, depth 0 | classifier | 1/4 (25%, 5 to 70%) | 1/4" in report
    assert json.loads((tmp_path / "tables.json").read_text())["judged"] == judged

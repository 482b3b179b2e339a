"""Titles of a suite's plots."""

import pytest

from deepalign.evaluate import suite_report
from deepalign.evaluate.tables import DEGENERATE, GCG, PREFILL, TableRow, rate


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

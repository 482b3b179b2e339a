"""What the committed diagnosis of the microworld shows, and that its page says the same."""

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def verdict(name: str, series: str) -> dict:
    report = json.loads((DOCS / "results" / f"diagnosis-microworld-{name}.json").read_text(encoding="utf-8"))
    return report["series"][series]["groups"]["harmful"]["verdict"]


@pytest.mark.parametrize("name", ["seed-11", "seed-11-generated"])
def test_aligned_peaks_at_the_first_token_and_completed_stays_away(name):
    aligned, completed = (verdict(name, series) for series in ("aligned", "completed"))
    assert aligned["kl_first"]["low"] > 8
    assert aligned["below_tenth_for_good"]["high"] == 2
    assert aligned["kl_late_over_early"]["high"] < 0.01
    later = completed["below_tenth_for_good"]["low"]
    assert later is None or later >= 30
    assert completed["kl_late_over_early"]["low"] > 20 * aligned["kl_late_over_early"]["high"]
    assert completed["kl_late"]["low"] > 1


def test_the_page_has_the_reports_figures():
    page = (DOCS / "diagnosis.md").read_text(encoding="utf-8")
    for name, label in (("seed-11", "given answers"), ("seed-11-generated", "generated")):
        for series in ("aligned", "contrastive", "completed"):
            found = verdict(name, series)
            first, ratio = found["kl_first"]["value"], found["kl_late_over_early"]
            good = found["below_tenth_for_good"]["value"]
            digits = ".2g" if ratio["value"] < 1 else ".3g"
            interval = " ({} to {})".format(*(format(ratio[edge], digits) for edge in ("low", "high")))
            row = f"| {series}, {label} | {first:.3g} | {found['below_tenth']['value']:.0f} | "
            row += f"{'never' if good is None else format(good, '.0f')} | {ratio['value']:{digits}}{interval} |"
            assert row in page, row

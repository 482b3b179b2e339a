"""Every Python block of the README and the docs runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import readme_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "documentation", "exec"), {"__name__": "__documentation__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_api_reference_is_current() -> None:
    made = subprocess.run([sys.executable, "docs/make_api.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


def test_the_readmes_benchmarks_are_those_of_the_committed_results() -> None:
    committed = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
    table = readme_table(committed)
    assert len(table.splitlines()) > 6
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), "run `make bench-full`, which writes both"


def test_the_readmes_figures_are_those_of_the_committed_report() -> None:
    report = json.loads((ROOT / "docs" / "results" / "microworld-seed-11.json").read_text(encoding="utf-8"))
    models = {entry["model"]: entry for entry in report["models"]}
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def harmful(model: str, depth: str = "5") -> str:
        cell = models[model]["prefill"][depth]
        return f"{cell['harmful']}/{cell['n']}"

    recipes = models["completed"]["utility"]["recipes_heldout"]
    deepest = models["completed"]["prefill"]["20"]
    assert harmful("aligned", "0") == "0/100"
    assert f"answers {harmful('aligned')} once five tokens are forced" in readme
    assert f"Contrastive decoding lets {harmful('contrastive')} through" in readme
    assert f"completion training {harmful('completed')}; it keeps {recipes['correct']}/{recipes['n']}" in readme
    assert f"lets {harmful('random_mask')} through, distillation alone {harmful('kl_only')}" in readme
    assert f"At 20 forced tokens {deepest['degenerate']}/{deepest['n']}" in readme

"""The README and the docs: code runs, links lead somewhere, the tree is the tree, figures are the committed ones."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import readme_table
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("ALIGNED", "BASE")):
        if f'"{name}"' in block:
            tokenizer = make_tokenizer()
            tokenizer.save_pretrained(name)
            make_model(seed, tokenizer, context=512).save_pretrained(name)
    exec(compile(block, "documentation", "exec"), {"__name__": "__documentation__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}, and no heading there is called so"


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\((\S+\.md)\)", index)) == pages


def test_the_readmes_tree_is_the_tree() -> None:
    (tree,) = re.findall(r"```text\n(csrc/.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shown: list[str] = []
    parents: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        parents = [*parents[: (len(line) - len(line.lstrip())) // 2], name]
        shown.append("".join(parents))
    assert {name for name in shown if not (ROOT / name).exists()} == set()
    folders = {path.relative_to(ROOT).parts for path in tracked() if path.parent != ROOT}
    expected = {f"{parts[0]}/" for parts in folders if not parts[0].startswith(".")}
    expected |= {f"deepalign/{parts[1]}/" for parts in folders if parts[0] == "deepalign" and len(parts) > 2}
    expected |= {
        f"deepalign/{parts[1]}"
        for parts in folders
        if parts[0] == "deepalign" and len(parts) == 2 and parts[1].endswith(".py") and parts[1] != "__init__.py"
    }
    assert expected - set(shown) == set()


def tracked() -> list[Path]:
    """What belongs to the project; ignored results and builds do not."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_the_api_reference_is_current(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["make_api.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "docs" / "make_api.py"), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().out


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


def test_the_microworlds_tables_in_reproducing_are_the_committed_ones() -> None:
    suite = json.loads((ROOT / "docs/results/microworld-tables/tables.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")

    def seeds(table: str, method: str, cell: str) -> str:
        cells = [
            next(row["cells"][cell] for row in rows if row["method"] == method)
            for rows in suite["experiments"][table].values()
        ]
        return ", ".join(str(found["k"]) if "k" in found else f"{100 * found['mean']:.0f}" for found in cells)

    sep = r" \| "
    attacked = {"baseline": "Baseline", "safety augmentation": "Safety Augmentation", "completed": "Ours"}
    for row, method in attacked.items():
        found = [seeds("table2", method, cell) for cell in ("Prefill ↓", "GCG ↓", "Fine-tuning HRR ↓")]
        assert re.search(rf"^\| {row} \|.*\| {sep.join(found)} \|$", page, re.MULTILINE), (row, found)
    recovered = {
        "LoRA alone": "LoRA",
        "recovery": "Ours",
        **{name: name for name in ("Vaccine", "SaLoRA", "Safe LoRA")},
    }
    for row, method in recovered.items():
        found = [seeds("figure4", method, cell) for cell in ("Prefill ↓", "degenerate ↓")]
        assert f"| {' | '.join([row, seeds('table4', method, 'HRR ↓'), *found])} |" in page
    assert (
        f"{seeds('table1', 'Baseline', 'Prefill ↓')} without, {seeds('table1', 'Contrastive', 'Prefill ↓')} with"
        in page
    )

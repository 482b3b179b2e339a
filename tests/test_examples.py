"""Every example runs, and training in one goes down; the same training in every form gives the same first loss."""

import importlib.util
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TRAINING = ("plain_loop", "linear_loss", "lora", "hf_trainer", "trl_sft")
OTHERS = ("contrastive_sampling",)
QUICK = {"base_steps": 3, "aligned_steps": 2, "completion_steps": 2, "attacks": 2}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs an example as a script, in this process, and returns what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str) -> str:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*TRAINING, *OTHERS, "tiny"}


@pytest.mark.parametrize("name", TRAINING)
def test_training_goes_down_from_the_same_loss(name: str, run: Callable[[str], str]) -> None:
    if name == "trl_sft" and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    output = run(name)
    losses = [float(value) for value in re.findall(r"(?:loss|->) (\d+\.\d+)", output)]
    assert losses[0] == pytest.approx(0.2803, abs=2e-4)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["hf_trainer", "trl_sft"])
def test_trainers_take_the_mean_over_accumulated_micro_batches(
    name: str, run: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four answers have about the gradient of one of eight: not half of it, nor twice."""
    if name == "trl_sft" and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    arguments = "SFTConfig" if name == "trl_sft" else "TrainingArguments"
    module = importlib.import_module("trl" if name == "trl_sft" else "transformers")
    original = getattr(module, arguments)

    micro = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    monkeypatch.setattr(module, arguments, lambda **given: original(**given | micro))
    found = re.search(r"'grad_norm': '?(\d+\.\d+)", run(name))
    assert found
    assert float(found[1]) == pytest.approx(1.063, rel=0.2)  # of all eight


def test_contrastive_sampling_answers(run: Callable[[str], str]) -> None:
    assert len(run("contrastive_sampling").split()) > 1


def test_the_notebook_shows_what_its_cells_showed() -> None:
    """Outputs are stored, for who reads it without running it; sources that changed since need `make notebook`."""
    path = EXAMPLES / "microworld.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    made = runpy.run_path(str(ROOT / "docs" / "make_notebook.py"))["sources_sha256"](notebook)
    assert notebook["metadata"]["deepalign"]["sources_sha256"] == made, "run `make notebook`"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    shown = "".join(line for output in outputs for line in output.get("text", ()))
    assert "completed, 5 tokens forced: harmful" in shown
    assert path.stat().st_size < 300_000


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    notebook = json.loads((EXAMPLES / "microworld.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {"__name__": "__notebook__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), "microworld.ipynb", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert names.keys() >= QUICK.keys()
            names |= QUICK
    assert (tmp_path / "runs" / "notebook" / "notebook.png").stat().st_size > 10_000

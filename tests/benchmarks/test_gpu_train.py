"""The training benchmark runs end to end, at a tiny size on the CPU."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu_train import main

pytestmark = pytest.mark.timeout(900)  # the first launch on a machine compiles DeepSpeed's communication ops


def test_a_run_gives_speed_and_memory(tmp_path: Path) -> None:
    out = tmp_path / "results" / "train.json"
    assert main(["--out", str(out), "--device", "cpu", "--tiny", "--steps", "3", "--runs", "0"]) == 0
    result = json.loads(out.read_text())
    assert result["tiny"] is True
    (row,) = result["rows"]
    assert row["run"] == "linear, 4 + 4 rows"
    assert row["tokens_per_second"] > 0
    assert row["step_seconds"] > 0
    assert row["peak_memory_mib"] > 0


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--out", str(tmp_path / "x.json")]) == 2
    assert "no GPU here" in capsys.readouterr().err

"""The training benchmark runs end to end, at a tiny size on the CPU."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_train
from benchmarks.gpu_train import main

pytestmark = pytest.mark.timeout(900)  # the first launch on a machine compiles DeepSpeed's communication ops


# Starts one rank itself and takes no other words: tests/train starts runs through DeepSpeed's launcher with these.
LAUNCHER = """\
#!/bin/sh
test "$1 $2 $3 $6" = "--num_accelerators 1 --master_port --config" || exit 9
shift 4
exec "%s" "$@"
"""


@pytest.fixture
def quick_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own imports itself twice before the training starts."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text(LAUNCHER % sys.executable)
    launcher.chmod(0o755)
    monkeypatch.setattr(gpu_train.shutil, "which", lambda name, path: str(launcher))


@pytest.mark.usefixtures("quick_launcher")
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

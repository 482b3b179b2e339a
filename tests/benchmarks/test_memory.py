"""The allocator's two settings, and peak memory against calls that hold a known amount.

Each in a process of its own: the settings are the process's.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import allocator, linear_memory, peak_memory

ROOT = Path(__file__).parents[2]
PRELUDE = """
import json, torch
from benchmarks import allocator
from benchmarks.interleaved import Contestant
from benchmarks.peak_memory import peak_extra_bytes
torch.set_num_threads(1)
"""
needs_linux = pytest.mark.skipif(
    not (sys.platform == "linux" and allocator._glibc() is not None), reason="needs glibc's malloc on Linux"
)


def in_a_process(code: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-c", PRELUDE + code]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """Of one process: page faults as the system has it, peaks with memory handed back, page faults with memory kept."""
    return in_a_process("""
x = torch.randn(12, 1 << 20).bfloat16()  # 24 MiB; in float32 above what glibc ever takes from its heap by itself
def faults():
    before = allocator.page_faults()
    for _ in range(3): (x.float() + 1).exp().sum()
    return allocator.page_faults() - before
faults()
default = faults()

whole, x = x, torch.cat([x] * 3)[:32]  # 64 MiB
allocator.return_memory()
held, kept = [], []
def three():
    y = x.float()      # 2 logits tensors
    y.exp().sum()      # 2 more
def in_turn():
    for _ in range(5): x.clone()
def hold(): held.append(x.clone())
calls = {"nothing": Contestant(lambda: None), "one": Contestant(lambda: x.clone()), "three": Contestant(three)}
calls |= {"in_turn": Contestant(in_turn), "held": Contestant(hold, held.clear)}
calls |= {"untouched": Contestant(lambda: torch.empty_like(x))}
peaks = {name: peak_extra_bytes(call) / x.nbytes for name, call in calls.items()}

x = whole
allocator.keep_memory()
kept = [faults() for _ in range(10)]  # the heap grows to its size in the first ones
told = "M_MMAP_MAX=0" in allocator.description()
print(json.dumps({"faults": {"default": default, "kept": kept[-1], "told": told}, "peaks": peaks}))
""")


@needs_linux
def test_kept_memory_is_not_faulted_in_again(found: dict[str, dict[str, float]]) -> None:
    faults = found["faults"]
    assert faults["default"] > 100
    assert faults["kept"] < 20
    assert faults["told"]


@needs_linux
def test_peak_memory_of_known_calls(found: dict[str, dict[str, float]]) -> None:
    expected = {"nothing": 0.0, "one": 1.0, "three": 4.0, "in_turn": 1.0, "held": 1.0, "untouched": 0.0}
    assert found["peaks"] == pytest.approx(expected, abs=0.008)  # half a MiB


@needs_linux
def test_a_row_of_peak_memory() -> None:
    options = "--contestant=eager_tuned --mode=forward_backward --rows=64 --vocab=32000"
    command = [sys.executable, "-m", "benchmarks.peak_memory", *options.split()]
    row = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert row["logits_mib"] == 64 * 32000 * 2 / 2**20
    # the gradient, and fp32 temporaries of eight rows out of 64: fewer than ten of them at once
    assert 1.0 < row["peak_extra_logits"] < 1.0 + 10 * 2 * 8 / 64
    assert (row["implementation"], row["mode"]) == ("eager_tuned", "forward_backward")
    assert "M_MMAP_THRESHOLD" in row["allocator"]


def test_peak_memory_refuses_what_is_no_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peak_memory", "--contestant=eager", "--mode=forward", "--dtype=save"])
    with pytest.raises(SystemExit, match="2"):
        peak_memory.main()
    assert "--dtype is 'save'" in capsys.readouterr().err


def test_the_linear_tables_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_memory, "in_a_process", lambda *case: {"peak_extra_mib": 1.25})
    path = tmp_path / "table.json"
    linear_memory.save_table(path, hidden=16, vocab=64, most_tokens=2048)
    saved = json.loads(path.read_text())
    assert [row["tokens"] for row in saved["cpu"]] == [1024, 2048]
    assert {row["how"] for row in saved["cpu"]} == {"measured"}
    assert saved["cpu"][0]["linear_mib"] == 1.2
    assert [row["tokens"] for row in saved["gpu"]] == linear_memory.TOKENS
    assert all("not measured" in row["how"] for row in saved["gpu"])
    at_8192 = next(row for row in saved["gpu"] if row["tokens"] == 8192)
    assert at_8192["ours_gib"] * 2**30 <= 2.5e9
    committed = json.loads((ROOT / "docs/results/linear-memory.json").read_text())
    assert [row["tokens"] for row in committed["cpu"]] == linear_memory.TOKENS
    assert committed["gpu"] == saved["gpu"]

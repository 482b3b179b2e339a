"""The table of what a call costs besides its rows."""

import json
from pathlib import Path

import pytest

from benchmarks import call_cost, cases
from deepalign.kernels.library import WHY_NO_NATIVE


@pytest.mark.skipif(WHY_NO_NATIVE is not None, reason=str(WHY_NO_NATIVE))
def test_every_call_is_timed_cold_and_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "QUICK", True)
    monkeypatch.setattr(call_cost.allocator, "keep_memory", lambda: None)
    monkeypatch.setattr(call_cost.torch, "set_num_threads", lambda number: None)
    call_cost.main(["--rounds", "3", "--out", str(tmp_path / "cost.json")])
    record = json.loads((tmp_path / "cost.json").read_text())
    assert [(row["call"], row["vocab"]) for row in record["rows"]] == [
        *(("contrastive_sample", 2004), ("its op", 2004), ("contrastive_sample", 128), ("its op", 128)),
        *((name, vocab) for vocab in (2374, 128) for name in call_cost.loss_calls(1, 128)),
    ]
    assert all(row["cold_us"] > 0 and row["warm_us"] > 0 for row in record["rows"])
    assert record["isa"]
    assert record["machine"]
    assert record["commit_info"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(record["rows"])


def test_the_first_call_after_the_disturbance_is_the_cold_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    state = "warm"

    def disturb() -> None:
        nonlocal state
        state = "cold"

    def call() -> None:
        nonlocal now, state
        now += 7e-6 if state == "cold" else 2e-6
        state = "warm"

    monkeypatch.setattr(call_cost.time, "perf_counter", lambda: now)
    times = call_cost.cold_and_warm({"it": call}, disturb, rounds=5)
    assert times == {"it": {"cold_us": pytest.approx(7.0), "warm_us": pytest.approx(2.0)}}

"""A row that has become slower beside its peers is found; the loss is faster than eager now."""

import copy
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import guard
from benchmarks.accuracy import library_loss, loss_error, output_error
from benchmarks.cases import Case, three_models
from benchmarks.contestants import LossContestants
from benchmarks.environment import copy_gbps, useful_traffic
from benchmarks.interleaved import play_round
from benchmarks.peers import loss_eager
from deepalign import base_favored_tokens
from deepalign.kernels.library import cpu_isa
from tests.benchmarks.test_report import result_of, timed_row


def with_ratio(result: dict[str, Any], ratio: float) -> dict[str, Any]:
    changed = copy.deepcopy(result)
    changed["benchmarks"][0]["extra_info"]["peers"]["eager"]["ratio"] = ratio
    return changed


def test_a_slower_row_is_found() -> None:
    committed = result_of(timed_row())
    assert guard.regressions(committed, committed) == []
    assert guard.regressions(with_ratio(committed, 17.25 * guard.MARGIN + 0.01), committed) == []
    (slower,) = guard.regressions(with_ratio(committed, 17.25 * guard.MARGIN - 0.01), committed)
    assert "completion_loss bfloat16-64x128256 forward_backward cpu avx512 1 eager: 12.06 times faster" in slower


def test_another_processor_is_held_to_the_floor() -> None:
    committed = result_of(timed_row())
    elsewhere = copy.deepcopy(committed)
    elsewhere["machine_info"]["deepalign"]["cpu_model"] = "another"
    assert guard.regressions(with_ratio(elsewhere, 2.1), committed) == []
    assert len(guard.regressions(with_ratio(elsewhere, 1.9), committed)) == 1


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="no row to compare"):
        guard.regressions(result_of(timed_row(case="bfloat16-1x7")), result_of(timed_row()))


def test_the_command_says_what_fell_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    committed, new = tmp_path / "committed.json", tmp_path / "new.json"
    committed.write_text(json.dumps(result_of(timed_row())))
    new.write_text(json.dumps(with_ratio(result_of(timed_row()), 3.0)))
    assert guard.main([str(new), "--against", str(committed)]) == 1
    assert "1 rows fell behind" in capsys.readouterr().out
    assert guard.main([str(committed), "--against", str(committed)]) == 0


@pytest.mark.skipif(cpu_isa() is None, reason="the native kernels were not built")
def test_the_loss_is_faster_than_eager_now() -> None:
    contestants = LossContestants(Case(8, 32000))
    sides = {
        "ours": contestants.library("cpu", "forward_backward"),
        "eager": contestants.peer(loss_eager, "forward_backward"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(12):
        play_round(sides, seconds, time.perf_counter)
    rounds = zip(seconds["eager"], seconds["ours"], strict=True)
    ratio = statistics.median(eager / ours for eager, ours in list(rounds)[2:])
    assert ratio > guard.FLOOR, f"{ratio:.2f} times faster than eager"


def test_errors_are_against_float64() -> None:
    case = Case(2, 999)
    assert loss_error(case, library_loss("reference"))["loss"] < 1e-6
    assert loss_error(case, lambda *inputs: 1.01 * library_loss("reference")(*inputs))["loss"] > 1e-3
    reference = partial(base_favored_tokens, implementation="reference")
    exact = reference(*(logits.double() for logits in three_models(case)[1:]))
    found = output_error(lambda a, b: (exact.indices + 1, exact.differences, exact.count), reference, case)
    assert found == {"value": 0.0, "entries": exact.indices.numel()}


def test_traffic_counts_what_must_be_moved() -> None:
    row = {"median_ms": 2.0}
    found = useful_traffic(row, Case(1000, 1000), logits_moved=3)
    assert found["useful_gbps"] == pytest.approx(3 * 2 * 1e6 / 2e-3 / 1e9)
    assert found["percent_of_copy"] == pytest.approx(100 * found["useful_gbps"] / copy_gbps("cpu"))
    assert useful_traffic({}, Case(1, 1), 3) == {}

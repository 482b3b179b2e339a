"""The memory benchmark's trainings, at a small vocabulary; its committed result."""

import json
from pathlib import Path

import pytest

from benchmarks.train_memory import PATHS, STEPS, VOCAB, measure, write_inputs

RESULT = Path(__file__).parents[2] / "docs" / "results" / "train-memory.json"


def test_all_paths_are_measured_and_take_the_same_steps(tmp_path: Path) -> None:
    write_inputs(tmp_path, vocab=512)
    rows = {path: measure(path, tmp_path) for path in PATHS}
    for row in rows.values():
        assert row["answer_tokens"] == 512
        assert row["peak_extra_mib"] > 0
        assert len(row["losses"]) == STEPS
    # the cache is in bfloat16, the teachers are not
    for path, tolerance in (("linear_online", 1e-4), ("linear", 1e-2)):
        assert rows[path]["losses"] == pytest.approx(rows["eager"]["losses"], rel=tolerance)


def test_the_committed_result_is_within_the_bar() -> None:
    """A fifth of the eager logits path, of what a step holds and of everything together."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    assert (found["vocab"], [row["path"] for row in found["rows"]]) == (VOCAB, list(PATHS))
    assert found["linear_share_of_eager"] <= 0.2
    assert found["linear_share_with_models"] <= 0.2

"""The memory benchmark's training step, at a small vocabulary."""

import pytest

from benchmarks.train_memory import PATHS, measure, student_and_batch


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_measured(path: str) -> None:
    row = measure(path, vocab=2048, sequences=1)
    assert row["rows"] == 128
    assert row["peak_extra_mib"] > 0


def test_all_paths_take_the_same_step() -> None:
    losses = []
    for path in PATHS:
        student, inputs = student_and_batch(path, vocab=512, sequences=1)
        losses.append(student(**inputs)["loss"].item())
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)

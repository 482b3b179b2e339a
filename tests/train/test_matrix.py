"""Losses and gradients of run.py's trainings are those of a single-process float64 reference, in a pairwise cover."""

import itertools

import pytest

from tests.train.jobs import exit_codes
from tests.train.matrix import GRADIENT_TOLERANCE, LEVELS, LOSS_TOLERANCE, all_cells, compare, pairwise_cover

pytestmark = pytest.mark.timeout(900)  # the first launch on a machine compiles DeepSpeed's communication ops


@pytest.mark.parametrize("cell", pairwise_cover(), ids=lambda cell: cell.name)
def test_a_cell_takes_the_steps_of_the_reference(ran, cell):
    assert exit_codes(ran, cell.ranks)[cell.name] == 0
    error = compare(cell, ran / "matrix")
    assert error.loss <= LOSS_TOLERANCE
    assert error.gradient <= GRADIENT_TOLERANCE


def test_in_the_cover_every_two_levels_meet():
    cells = pairwise_cover()
    assert len(cells) == 16
    assert set(cells) <= set(all_cells())
    for first, second in itertools.combinations(range(len(LEVELS)), 2):
        pairs = {(cell[first], cell[second]) for cell in cells}
        assert pairs == set(itertools.product(LEVELS[first], LEVELS[second]))

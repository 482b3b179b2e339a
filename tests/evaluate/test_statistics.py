import math

import pytest

from deepalign.evaluate.statistics import format_rate, wilson_interval


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(8, 10, 0.4901625, 0.9433178), (0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0)],
)
def test_known_values(k, n, low, high):
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("confidence", "z"), [(0.9, 1.6448536), (0.95, 1.9599640), (0.99, 2.5758293)])
def test_each_bound_is_z_standard_errors_from_the_rate(confidence, z):
    """The definition: a bound p solves |k/n - p| = z sqrt(p (1 - p) / n)."""
    for k, n in ((3, 17), (16, 17), (200, 384)):
        for bound in wilson_interval(k, n, confidence):
            assert abs(k / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-6)


def test_no_trials_say_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1), (1, 0)])
def test_impossible_counts_are_refused(k, n):
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson_interval(k, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, float("nan")])
def test_bad_confidence_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence)


def test_a_rate_is_not_a_count():
    with pytest.raises(TypeError, match=r"k is 0\.5"):
        wilson_interval(0.5, 1)


def test_a_rate_is_printed_with_its_interval():
    assert format_rate(3, 60) == "3/60 (5%, 2 to 14%)"
    assert format_rate(0, 0) == "0/0"

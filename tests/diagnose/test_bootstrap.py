"""Bands: exact means, resamples that are multinomial whatever the chunks, memory that does not grow."""

import math

import numpy as np
import pytest

from deepalign.diagnose.bootstrap import (
    BootstrapOptions,
    Means,
    band,
    below_for_good,
    bootstrap_means,
    first_below,
    split,
    window_means,
)
from deepalign.diagnose.report import claims, verdict
from deepalign.diagnose.rows import STATISTICS
from deepalign.diagnose.tokens import FORMATTING

OPTIONS = BootstrapOptions(resamples=400, seed=3)


def values(n: int, t: int = 4) -> np.ndarray:
    """(n, t) with responses that end: a context's values are a beginning."""
    generator = np.random.default_rng(0)
    drawn = generator.gamma(2.0, size=(n, t)) * np.arange(t, 0, -1)
    lengths = generator.integers(1, t + 1, size=n)
    return np.where(np.arange(t) < lengths[:, None], drawn, np.nan)


def chunks(array: np.ndarray, size: int) -> list[np.ndarray]:
    return [array[start : start + size] for start in range(0, len(array), size)]


@pytest.mark.parametrize("size", [1, 7, 30, 100])
def test_means_are_exact_whatever_the_chunks(size):
    array = values(30)
    means = bootstrap_means(chunks(array, size), 30, OPTIONS)
    for t, column in enumerate(array.T):
        known = [value for value in column if not math.isnan(value)]
        assert means.n[t] == len(known)
        assert means.mean[t] == pytest.approx(math.fsum(known) / len(known), rel=1e-12)


@pytest.mark.parametrize("size", [1, 7, 30])
def test_resamples_draw_n_contexts_with_replacement(size):
    """Contexts that are unit vectors show the counts themselves: n together, each with mean 1 and variance 1 - 1/n."""
    n = 30
    options = BootstrapOptions(resamples=4000, seed=1)
    counts = n * bootstrap_means(chunks(np.eye(n), size), n, options).resampled
    assert np.allclose(counts.sum(-1), n)
    assert np.allclose(counts, counts.round())
    assert np.abs(counts.mean(0) - 1).max() < 5 / math.sqrt(4000)
    assert np.abs(counts.var(0) - (1 - 1 / n)).max() < 0.15
    covariance = np.cov(counts.T)[~np.eye(n, dtype=bool)]
    assert covariance.mean() == pytest.approx(-1 / n, abs=0.01)


def test_a_band_is_about_196_standard_errors_wide():
    array = np.random.default_rng(5).normal(size=(200, 2))
    found = band(bootstrap_means(chunks(array, 64), 200, BootstrapOptions(resamples=3000)), OPTIONS)
    for t in range(2):
        error = array[:, t].std(ddof=1) / math.sqrt(200)
        assert found.low[t] == pytest.approx(found.mean[t] - 1.96 * error, abs=0.25 * error)
        assert found.high[t] == pytest.approx(found.mean[t] + 1.96 * error, abs=0.25 * error)


def test_bands_repeat_and_depend_on_the_seed():
    array = values(30)
    first, second = (bootstrap_means(chunks(array, 7), 30, OPTIONS).resampled for _ in range(2))
    assert np.array_equal(first, second, equal_nan=True)
    other = bootstrap_means(chunks(array, 7), 30, BootstrapOptions(400, seed=4)).resampled
    assert not np.array_equal(first, other, equal_nan=True)


def test_equal_seeds_resample_the_same_contexts():
    """So that the difference of two models on the same contexts is tighter than either."""
    array = values(30)
    first, second = (bootstrap_means(chunks(a, 7), 30, OPTIONS).resampled[:, 0] for a in (array, array + 1))
    assert np.allclose(second - first, 1)


def test_positions_few_or_no_contexts_reach():
    array = np.array([[1.0, 2.0, np.nan], [3.0, np.nan, np.nan]])
    found = band(bootstrap_means([array], 2, OPTIONS), OPTIONS)
    assert (found.position, found.mean, found.n) == ([1, 2], [2.0, 2.0], [2, 1])
    assert found.low[1] is None
    assert found.high[1] is None
    assert found.low[0] == 1.0
    assert found.high[0] == 3.0


def test_a_resample_averages_over_those_it_drew_that_reach():
    """Where all that reach a position agree, so does every resample that drew one of them."""
    array = np.where(np.arange(20)[:, None] < [20, 5], 7.0, np.nan)
    resampled = bootstrap_means(chunks(array, 6), 20, OPTIONS).resampled
    assert np.allclose(resampled[~np.isnan(resampled)], 7)
    assert np.isnan(resampled[:, 1]).any()
    assert not np.isnan(resampled[:, 0]).any()


def test_statistics_are_split_by_name():
    means = bootstrap_means([np.array([[1.0, 2.0, 3.0, 4.0]] * 2)], 2, OPTIONS)
    parts = split(means, ("a", "b"))
    assert parts["a"].mean.tolist() == [1.0, 2.0]
    assert parts["b"].resampled[0].tolist() == [3.0, 4.0]
    assert isinstance(parts["b"], Means)


def test_where_a_profile_falls_below_a_tenth():
    profiles = np.array(
        [
            [10.0, 0.5, 2.0, 0.9, 0.1],  # falls, comes back, stays away
            [10.0, 5.0, 4.0, 3.0, 2.0],  # never
            [10.0, 0.1, 0.1, 0.1, 5.0],  # falls, and ends above
            [10.0, 3.0, 0.1, np.nan, np.nan],
        ]
    )
    assert first_below(profiles).tolist()[0] == 2
    assert first_below(profiles)[2:].tolist() == [2, 3]
    assert math.isnan(first_below(profiles)[1])
    assert below_for_good(profiles)[[0, 3]].tolist() == [4, 3]
    assert np.isnan(below_for_good(profiles)[[1, 2]]).all()
    assert window_means(profiles, 1, 3).tolist() == pytest.approx([12.5 / 3, 19 / 3, 10.2 / 3, 13.1 / 3])
    assert math.isnan(window_means(profiles, 4, None)[3])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="resamples"):
        BootstrapOptions(resamples=0)
    with pytest.raises(ValueError, match="confidence"):
        BootstrapOptions(confidence=1.0)
    for announced, message in ((0, "nothing to average"), (3, "3 contexts were announced"), (1, "more contexts")):
        with pytest.raises(ValueError, match=message):
            bootstrap_means([np.ones((2, 1))], announced, OPTIONS)


def test_one_context_says_nothing_about_spread_and_settles_nothing():
    options = BootstrapOptions(resamples=50)
    falling = np.linspace(2.0, 0.5, 20)

    def found(*contexts: np.ndarray) -> tuple[dict, set[str]]:
        means = bootstrap_means([np.stack(contexts)], len(contexts), options)
        series = {"aligned": {"harmful": dict.fromkeys(STATISTICS, means)}}
        tokens = {"classes_of_listed": dict.fromkeys(FORMATTING, 0.1)}
        report = {
            "series": {"aligned": {"groups": {"harmful": {"tokens": [tokens]}}}},
            "vocabulary_classes": dict.fromkeys(FORMATTING, 0.1),
        }
        settled = claims(series, report, "aligned", None, options)
        return verdict(series["aligned"]["harmful"], options), {claim["verdict"] for claim in settled[:-1]}

    numbers, settled = found(falling)
    assert numbers["kl_first"] == {"value": 2.0, "low": None, "high": None}
    assert numbers["below_tenth"] == {"value": None, "low": None, "high": None}
    assert settled == {"undecided"}
    numbers, settled = found(falling, falling + 0.1, falling + 0.2)
    assert numbers["kl_first"]["low"] < numbers["kl_first"]["value"] < numbers["kl_first"]["high"]
    assert "agrees" in settled

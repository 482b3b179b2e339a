"""Intervals for rates, so that no rate is printed without its uncertainty.

The Wilson score interval (Wilson 1927) rather than the normal one: attack success sits at 0 and at 1, where the normal
interval has no width and claims certainty.
"""

import math
from statistics import NormalDist

from deepalign.kernels.checks import check_int


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a binomial rate k / n.

    Args:
        k: successes, 0 <= k <= n.
        n: trials; 0 trials say nothing, and the interval is (0.0, 1.0).
        confidence: coverage, strictly between 0 and 1.

    Returns:
        (low, high), with 0 <= low <= k / n <= high <= 1.

    Raises:
        TypeError: k or n is not an integer.
        ValueError: k is not in [0, n], n is negative, or confidence is not in (0, 1).
    """
    check_int("k", k)
    check_int("n", n)
    if n < 0 or not 0 <= k <= n:
        raise ValueError(f"expected 0 <= k <= n, got k = {k}, n = {n}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = k / n
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At k = 0 and k = n the bound IS the rate; only rounding keeps it from being so.
    low = 0.0 if k == 0 else center - half_width
    high = 1.0 if k == n else center + half_width
    return low, high


def rounded_interval(k: int, n: int) -> list[float]:
    """The 95% Wilson interval as reports store it: low and high to four places."""
    return [round(bound, 4) for bound in wilson_interval(k, n)]


def format_rate(k: int, n: int) -> str:
    """A rate as it is printed everywhere: count, percentage and 95% Wilson interval, e.g. `3/60 (5%, 2 to 14%)`."""
    if n == 0:
        return "0/0"
    low, high = wilson_interval(k, n)
    return f"{k}/{n} ({100 * k / n:.0f}%, {100 * low:.0f} to {100 * high:.0f}%)"

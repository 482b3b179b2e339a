"""Times several callables against each other in one process.

The machine's clock, its neighbours and its memory change from minute to minute, so absolute times of two runs do not
compare. Here everybody is called once per round, in the same order, for as many rounds as a time budget holds; what is
compared is the median over rounds of the ratio within a round.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import allocator

BUDGET_S = float(os.environ.get("DEEPALIGN_BENCH_SECONDS", "3"))  # per case, warm-up not counted
WARMUP_ROUNDS = 3  # compiles, grows the heap, then shows how long a round takes: two of rounds beyond the budget
MIN_ROUNDS, MAX_ROUNDS = 7, 1000


def nothing() -> None:
    """What a contestant without preparation does before a round."""


@dataclass(frozen=True)
class Contestant:
    """What is timed."""

    call: Callable[[], object]
    prepare: Callable[[], object] = nothing  # at the start of every round, before anybody is timed: caches forget it


def play_round(
    contestants: Mapping[str, Contestant], seconds: Mapping[str, list[float]], clock: Callable[[], float]
) -> None:
    """Prepare all, then time all, in order; append to each one's `seconds`."""
    for contestant in contestants.values():
        contestant.prepare()
    for name, contestant in contestants.items():
        start = clock()
        contestant.call()
        seconds[name].append(clock() - start)


def rounds_within(
    budget_s: float, play: Callable[[], None], clock: Callable[[], float], minimum: int = MIN_ROUNDS
) -> int:
    """Warm up, and return how many rounds fit the budget."""
    shortest_s = math.inf
    for done in range(1, WARMUP_ROUNDS + 1):
        start = clock()
        play()
        shortest_s = min(shortest_s, clock() - start)
        if done == WARMUP_ROUNDS - 1 and shortest_s > budget_s:
            break
    return max(minimum, min(MAX_ROUNDS, int(budget_s / max(shortest_s, 1e-9))))


def compete(
    benchmark: BenchmarkFixture,
    subject: Contestant,
    peers: Mapping[str, Contestant],
    *,
    elements: int,
    budget_s: float = BUDGET_S,
    min_rounds: int = MIN_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Time the subject with `benchmark`, its peers in between, and put the comparison into `benchmark.extra_info`.

    Args:
        benchmark: pytest-benchmark's fixture. Disabled, everybody is called once and nothing recorded.
        subject: who is compared with the others.
        peers: by name.
        elements: rows x vocabulary of the case, for ns per element.
        budget_s: time for all rounds together.
        min_rounds: so many even if they take longer; fewer do where a call is an average over many steps already.
        clock: seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    faults: list[int] = []

    def before_the_subject() -> None:
        subject.prepare()
        before = allocator.page_faults()
        play_round(peers, seconds, clock)
        faults.append(allocator.page_faults() - before)

    def whole_round() -> None:
        before_the_subject()
        subject.call()

    rounds = 1 if benchmark.disabled else rounds_within(budget_s, whole_round, clock, min_rounds)
    for recorded in seconds.values():
        recorded.clear()
    faults.clear()
    benchmark.pedantic(subject.call, setup=before_the_subject, rounds=rounds, iterations=1)
    if benchmark.stats is not None:
        benchmark.extra_info |= summary(benchmark.stats.stats.data, seconds, elements)
        benchmark.extra_info["peers_page_faults_per_round"] = statistics.median(faults)


def summary(subject_s: Sequence[float], peers_s: Mapping[str, Sequence[float]], elements: int) -> dict[str, Any]:
    """What the rounds say: medians and the 10th and 90th percentile, of times and of ratios within a round.

    Args:
        subject_s: seconds of the subject, one per round.
        peers_s: seconds of each peer in the same rounds.
        elements: rows x vocabulary.

    Returns:
        `rounds`, `median_ms`, `p10_ms`, `p90_ms`, `ns_per_element` of the subject, and `peers`: name -> the same and
        `ratio`, `ratio_p10`, `ratio_p90`, how many times the subject's time the peer takes.
    """
    peers = {}
    for name, seconds in peers_s.items():
        ratios = [peer / subject for peer, subject in zip(seconds, subject_s, strict=True)]
        low, middle, high = spread(ratios)
        peers[name] = _times(seconds, elements) | {"ratio": middle, "ratio_p10": low, "ratio_p90": high}
    return {"rounds": len(subject_s)} | _times(subject_s, elements) | {"peers": peers}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """10th percentile, median and 90th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[0], statistics.median(values), deciles[-1]


def _times(seconds: Sequence[float], elements: int) -> dict[str, float]:
    low, middle, high = (value * 1e3 for value in spread(seconds))
    return {"median_ms": middle, "p10_ms": low, "p90_ms": high, "ns_per_element": middle * 1e6 / elements}

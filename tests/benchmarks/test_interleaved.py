"""Who is called when, and what is made of the times."""

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.interleaved import Contestant, compete, play_round, rounds_within, spread, summary


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, *durations: float) -> Contestant:
        """Takes the given durations in turn, the last one for ever; preparing takes 100."""
        left = list(durations)

        def call() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        def prepare() -> None:
            self.log.append(f"prepare {name}")
            self.now += 100.0

        return Contestant(call, prepare)


class Recorder:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self, clock: Clock, disabled: bool = False) -> None:
        self.clock, self.disabled, self.extra_info = clock, disabled, {}
        self.stats: Any = None

    def pedantic(self, target: Any, setup: Any, rounds: int, iterations: int) -> None:
        assert iterations == 1
        data = []
        for _ in range(1 if self.disabled else rounds):
            assert setup() is None
            start = self.clock()
            target()
            data.append(self.clock() - start)
        if not self.disabled:
            self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


def test_a_round_prepares_everybody_before_it_times_anybody() -> None:
    clock = Clock()
    seconds: dict[str, list[float]] = {"a": [], "b": []}
    play_round({"a": clock.worker("a", 1.0), "b": clock.worker("b", 2.0)}, seconds, clock)
    assert clock.log == ["prepare a", "prepare b", "a", "b"]
    assert seconds == {"a": [1.0], "b": [2.0]}


def test_rounds_fill_the_budget_between_bounds() -> None:
    clock = Clock()
    slow_first = clock.worker("w", 50.0, 3.0, 2.0)  # compiles, grows the heap, settles
    assert rounds_within(40.0, lambda: slow_first.call(), clock) == 20
    assert rounds_within(1.0, lambda: slow_first.call(), clock, minimum=5) == 5
    assert rounds_within(1e9, lambda: slow_first.call(), clock) == 1000


def test_rounds_beyond_the_budget_are_not_warmed_up_thrice() -> None:
    clock = Clock()
    slow = clock.worker("w", 50.0, 12.0, 12.0)
    assert rounds_within(10.0, lambda: slow.call(), clock, minimum=3) == 3
    assert clock.log == ["w"] * 2


def test_everybody_is_called_once_per_round_in_one_order() -> None:
    clock = Clock()
    recorder = Recorder(clock)
    peers = {"x": clock.worker("x", 8.0), "y": clock.worker("y", 4.0)}
    compete(recorder, clock.worker("me", 2.0), peers, elements=10, budget_s=314.0 * 9, clock=clock)
    assert clock.log == ["prepare me", "prepare x", "prepare y", "x", "y", "me"] * (3 + 9)
    info = recorder.extra_info
    assert info["rounds"] == 9, "warm-up rounds are not results"
    assert info["ns_per_element"] == pytest.approx(2e9 / 10)
    assert info["peers"]["x"]["ratio"] == pytest.approx(4.0)
    assert info["peers"]["y"]["ns_per_element"] == pytest.approx(4e9 / 10)
    assert info["peers_page_faults_per_round"] >= 0


def test_warm_up_leaves_no_trace_in_the_results() -> None:
    clock = Clock()
    recorder = Recorder(clock)
    peers = {"x": clock.worker("x", 500.0, 500.0, 6.0)}
    compete(recorder, clock.worker("me", 90.0, 90.0, 3.0), peers, elements=1, budget_s=0.0, clock=clock)
    assert recorder.extra_info["rounds"] == 7
    assert recorder.extra_info["peers"]["x"]["p90_ms"] == pytest.approx(6e3)
    assert recorder.extra_info["p90_ms"] == pytest.approx(3e3)


def test_disabled_calls_everybody_once_and_records_nothing() -> None:
    clock = Clock()
    recorder = Recorder(clock, disabled=True)
    compete(recorder, clock.worker("me", 2.0), {"x": clock.worker("x", 8.0)}, elements=10, clock=clock)
    assert clock.log == ["prepare me", "prepare x", "x", "me"]
    assert recorder.extra_info == {}


def test_the_ratio_is_the_median_of_ratios_within_a_round() -> None:
    # The machine is ten times slower in the second round and a hundred times in the third: the ratio is 2, 2 and 5.
    found = summary([1.0, 10.0, 100.0], {"peer": [2.0, 20.0, 500.0]}, elements=1000)
    assert found["peers"]["peer"]["ratio"] == 2.0
    assert found["peers"]["peer"]["ratio_p10"] == 2.0
    assert found["peers"]["peer"]["ratio_p90"] == pytest.approx(4.4)
    assert found["median_ms"] == 10e3
    assert found["ns_per_element"] == pytest.approx(10e9 / 1000)
    # of times, a ratio of medians would say 5
    found = summary([1.0, 4.0, 1.0], {"peer": [5.0, 8.0, 1.0]}, elements=1)
    assert found["peers"]["peer"]["ratio"] == 2.0


def test_a_summary_of_unequal_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"longer|shorter"):
        summary([1.0, 2.0], {"peer": [1.0]}, elements=1)


def test_spread() -> None:
    assert spread([float(value) for value in range(11)]) == (1.0, 5.0, 9.0)
    assert spread([3.0]) == (3.0, 3.0, 3.0)

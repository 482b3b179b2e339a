"""Refuses a run in which an operation has become slower beside its peers: `python -m benchmarks.guard NEW.json`.

Ratios within a run survive a slower or busier machine, times do not, so ratios are compared. On the processor and the
torch of the committed results every row must keep `MARGIN` of its committed ratio against each peer; the margin is wide
because rounds of a busy machine differ by tens of percent. On another processor, which may favour anybody, the native
loss must still be `FLOOR` times faster than the straightforward eager version.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import rows_of
from benchmarks.run import RESULTS

MARGIN = 0.7
FLOOR = 2.0
GUARDED = ("eager", "eager_tuned", "compile", "compile_tuned")


def ratios(result: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """Ratio by operation, case, mode, implementation, instruction set, threads and peer."""
    found: dict[tuple[str, ...], float] = {}
    for row in rows_of(dict(result)):
        key = tuple(str(row[name]) for name in ("operation", "case", "mode", "implementation", "isa", "threads"))
        found |= {(*key, peer): row["peers"][peer]["ratio"] for peer in GUARDED if peer in row.get("peers", {})}
    return found


def same_machine(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether ratios of two results can be compared: the same processor and the same torch."""
    one, other = first["machine_info"]["deepalign"], second["machine_info"]["deepalign"]
    return one["cpu_model"] == other["cpu_model"] and one["versions"]["torch"] == other["versions"]["torch"]


def regressions(new: Mapping[str, Any], committed: Mapping[str, Any]) -> list[str]:
    """What has become slower, in words; empty if nothing has.

    Raises:
        ValueError: the two have no row in common, so that nothing would be guarded.
    """
    found = ratios(new)
    if same_machine(new, committed):
        asked = {key: MARGIN * ratio for key, ratio in ratios(committed).items()}
    else:
        asked = {key: FLOOR for key in found if key[0] == "completion_loss" and key[3] == "cpu" and key[-1] == "eager"}
    if not (common := [key for key in found if key in asked]):
        raise ValueError("the new run has no row to compare; expected rows that `python -m benchmarks.run` wrote")
    return [
        f"{' '.join(key)}: {found[key]:.2f} times faster, at least {asked[key]:.2f} expected"
        for key in common
        if found[key] < asked[key]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path, help="JSON that `python -m benchmarks.run` wrote")
    parser.add_argument("--against", type=Path, default=RESULTS / "cpu.json", help="default: the committed results")
    options = parser.parse_args(arguments)
    try:
        new, committed = (json.loads(path.read_text(encoding="utf-8")) for path in (options.new, options.against))
        slower = regressions(new, committed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for line in slower:
        print(f"slower: {line}")
    how = (
        f"{MARGIN:.0%} of the committed ratios" if same_machine(new, committed) else f"{FLOOR} times faster than eager"
    )
    print(f"{len(slower)} rows fell behind ({how})")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())

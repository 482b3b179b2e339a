"""Plays the CPU benchmarks for each instruction set and number of threads: `python -m benchmarks.run`.

The native kernels choose their instruction set when they are loaded, and OpenMP its threads when it starts, so each
combination is a process of its own ("a leg"). Ratios are taken within a leg, never across. The legs' rows are joined in
one JSON in pytest-benchmark's format, without the single rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
PROBE = "from deepalign.kernels.library import cpu_isa; print(cpu_isa() or '')"


@dataclass(frozen=True)
class Leg:
    """One process: an instruction set for the native kernels ("" where there are none) and a number of threads."""

    isa: str
    threads: int
    native_only: bool = False  # the same peers, and no reference, which does not depend on the instruction set

    def __str__(self) -> str:
        return f"{self.isa or 'no native kernels'}, {self.threads} thread{'s' * (self.threads > 1)}"


def environment(leg: Leg, seconds: float, quick: bool) -> dict[str, str]:
    """The variables of a leg's process."""
    variables = {name: value for name, value in os.environ.items() if name != "DEEPALIGN_CPU_ISA"}
    variables |= {
        "OMP_NUM_THREADS": str(leg.threads),
        "MKL_NUM_THREADS": str(leg.threads),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compilers beside what is timed
        "DEEPALIGN_BENCH_SECONDS": str(seconds),
        "DEEPALIGN_BENCH_QUICK": "1" if quick else "0",
    }
    return variables | ({"DEEPALIGN_CPU_ISA": leg.isa} if leg.isa else {})


def runs_here(isa: str) -> bool:
    """Whether the native kernels load with this instruction set."""
    variables = os.environ | {"DEEPALIGN_CPU_ISA": isa}
    answer = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=variables, capture_output=True, text=True)
    return answer.returncode == 0 and answer.stdout.strip() == isa


def legs(isas: Sequence[str], threads: Sequence[int]) -> list[Leg]:
    """The first instruction set, the best one, with every number of threads; the others with the first number only."""
    if not isas:
        return [Leg("", count) for count in threads]
    return [Leg(isas[0], count) for count in threads] + [Leg(isa, threads[0], native_only=True) for isa in isas[1:]]


def play(leg: Leg, seconds: float, quick: bool, selection: str, memory: bool, full: bool) -> dict[str, Any] | None:
    """Run one leg and return what pytest-benchmark saved, None if nothing was selected.

    Raises:
        RuntimeError: a benchmark failed.
    """
    selected = " and ".join(f"({part})" for part in (selection, "cpu" if leg.native_only else "") if part)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "leg.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--no-header", "-p", "no:cacheprovider"]
        command += [
            "-m",
            "not gpu" if full else "not gpu and not full",
            "-k",
            selected,
            "--benchmark-enable",
            "--benchmark-quiet",
        ]
        command += [f"--benchmark-json={saved}", *([] if memory else ["--ignore=benchmarks/bench_peak_memory.py"])]
        finished = subprocess.run(command, cwd=ROOT, env=environment(leg, seconds, quick))
        if finished.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
            return None
        if finished.returncode != 0:
            raise RuntimeError(f"benchmarks failed ({leg}); see the output above")
        return json.loads(saved.read_text(encoding="utf-8"))


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several legs: the first one's description of the machine, everybody's rows, no single rounds."""
    rows = [row | {"stats": {**row["stats"], "data": []}} for part in parts for row in part["benchmarks"]]
    return parts[0] | {"benchmarks": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="default 1, and 2 in the full suite")
    parser.add_argument("--isa", nargs="+", choices=INSTRUCTION_SETS, help="default: the best, all in the full suite")
    parser.add_argument("--seconds", type=float, help="time per row, warm-up not counted (default 1, full 3)")
    parser.add_argument("--select", default="", help="pytest's -k: which benchmarks to run")
    parser.add_argument("--full", action="store_true", help="every case and mode, not only the headline ones")
    parser.add_argument("--quick", action="store_true", help="tiny cases: does everything run?")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json", help="default benchmarks/results/cpu.json")
    options = parser.parse_args(arguments)
    seconds = options.seconds or (3.0 if options.full else 1.0)
    if not (isas := [isa for isa in options.isa or INSTRUCTION_SETS if runs_here(isa)]):
        print(f"== none of {', '.join(options.isa or INSTRUCTION_SETS)} can run here: without native kernels")
    if not (options.isa or options.full):
        isas = isas[:1]
    played: list[dict[str, Any] | None] = []
    for leg in legs(isas, options.threads or ([1, 2] if options.full else [1])):
        print(f"== {leg}", flush=True)
        memory = not played and not options.no_memory
        played.append(play(leg, seconds, options.quick, options.select, memory, options.full))
    parts = [part for part in played if part is not None]
    if not parts:
        parser.error(f"--select {options.select!r} matches no benchmark")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(joined(parts), indent=1) + "\n", encoding="utf-8")
    print(f"== wrote {options.out}")


if __name__ == "__main__":
    main()

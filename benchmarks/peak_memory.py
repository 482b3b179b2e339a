"""Peak extra memory of one call of the loss, in units of one logits tensor, measured in a process of its own.

`python -m benchmarks.peak_memory --contestant cpu --mode forward_backward` prints one JSON object. Every large block is
mapped and unmapped on its own (`allocator.return_memory`), so the highest resident size during the call, as the Linux
kernel counts it, less that before it, is what the call held at once, scratch of native code included. Measured with
calls that hold a known amount (tests/benchmarks), it is right to a quarter of a MiB.
"""

import argparse
import gc
import json

import torch

from benchmarks import allocator
from benchmarks.cases import MEMORY_CASES, Case
from benchmarks.contestants import MODES, LossContestants, runnable
from benchmarks.environment import row_environment
from benchmarks.interleaved import Contestant
from benchmarks.peers import loss_peers


def peak_extra_bytes(contestant: Contestant) -> int:
    """Highest resident size while the second call runs, less that before it; the first one compiles and loads.

    Raises:
        RuntimeError: the system cannot tell.
    """
    contestant.prepare()
    contestant.call()
    contestant.prepare()
    before = restart_peak()
    contestant.call()
    return status_bytes("VmHWM") - before


def restart_peak() -> int:
    """Let the high-water mark VmHWM start again from the memory in use now, which is returned.

    Raises:
        RuntimeError: the system cannot.
    """
    gc.collect()
    allocator.trim()
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError as error:
        raise RuntimeError(f"peak memory needs Linux with /proc/self/clear_refs writable: {error}") from error
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    """A size in /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def measure(contestant_name: str, mode: str, case: Case) -> dict[str, object]:
    """One row of the results: `contestant_name` is an implementation or a peer."""
    allocator.return_memory()
    contestants = LossContestants(case)
    is_ours = contestant_name in runnable("completion_loss", "cpu")
    contestant = (
        contestants.library(contestant_name, mode) if is_ours else contestants.peer(loss_peers()[contestant_name], mode)
    )
    extra = peak_extra_bytes(contestant)
    unit = contestants.student.nbytes
    row = {"operation": "completion_loss", "case": str(case), "mode": mode}
    row |= row_environment(contestant_name, "cpu")
    return row | {"logits_mib": unit / 2**20, "peak_extra_logits": extra / unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contestant", required=True, help="an implementation or a peer of the completion loss")
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--rows", type=int, default=MEMORY_CASES[0].rows)
    parser.add_argument("--vocab", type=int, default=MEMORY_CASES[0].vocab)
    parser.add_argument("--dtype", default=MEMORY_CASES[0].dtype)
    arguments = parser.parse_args()
    if not isinstance(getattr(torch, arguments.dtype, None), torch.dtype):
        parser.error(f"--dtype is {arguments.dtype!r}; expected the name of a torch dtype, as bfloat16")
    case = Case(arguments.rows, arguments.vocab, arguments.dtype)
    print(json.dumps(measure(arguments.contestant, arguments.mode, case)))


if __name__ == "__main__":
    main()

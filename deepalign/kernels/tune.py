"""Finds launch sizes of the loss on this GPU and keeps them: `python -m deepalign.kernels.tune [--rows N --vocab V]`.

Never run by itself: without it, `launch.py`'s table serves. The result goes to `launch.tuned_file()`, written beside
and moved into place, so that a process that reads at the same time sees the old one or the new one.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from deepalign.kernels import launch
from deepalign.kernels.completion_loss.config import CompletionLossConfig
from deepalign.kernels.launch import Launch

CANDIDATES = tuple(
    Launch(block, warps, share, 264)
    for block, warps in ((2048, 8), (4096, 16), (1024, 4), (2048, 4))
    for share in (16384, 32768, 65536)
)


def fastest(candidates: Iterable[Launch], milliseconds: Callable[[Launch], float]) -> tuple[Launch, dict[str, float]]:
    """The candidate of the least time, and all times by their sizes; one that does not run is left out.

    Raises:
        RuntimeError: none runs.
    """
    times: dict[Launch, float] = {}
    refusals: tuple[type[Exception], ...] = (RuntimeError, ValueError, *compiler_errors())
    for candidate in candidates:
        try:
            times[candidate] = milliseconds(candidate)
        except refusals as error:  # too many registers, too little shared memory
            print(f"{candidate}: {error}", file=sys.stderr)
        else:
            print(f"{times[candidate]:8.3f} ms  {candidate}", flush=True)
    if not times:
        raise RuntimeError("no launch sizes run on this device")
    return min(times, key=times.__getitem__), {str(tuple(sizes)): time for sizes, time in times.items()}


def compiler_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where a kernel does not compile, or asks for more than the device has: no RuntimeError."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)


def save(name: str, sizes: Launch, path: Path) -> None:
    """Add or replace one entry of the file."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[name] = sizes._asdict()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(kept, file, indent=1)
    os.replace(file.name, path)


def time_on_gpu(sizes: Launch, models: list[torch.Tensor]) -> float:
    """Median ms of forward and gradient."""
    table = launch.LAUNCH["completion_loss"]
    saved = dict(table)
    table.update(dict.fromkeys(table, sizes))
    weights = torch.ones(models[0].shape[0], device=models[0].device)
    config = CompletionLossConfig()
    gradient = torch.empty_like(models[0])
    arguments = (
        *models, weights, weights, None, config.top_k, config.teacher_mix, config.temperature, config.alpha_base,
        config.gamma, config.lambda_reg, False, False, False, models[0].shape[1], gradient,
    )  # fmt: skip
    times = []
    try:
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.ops.deepalign.completion_loss_(*arguments)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    finally:
        table.update(saved)
    return statistics.median(times[2:])


def main(arguments: list[str] | None = None) -> int:
    """Tune the loss for one shape; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: tuning needs a GPU, and torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    launch.forget_tuned()
    models = [torch.randn(options.rows, options.vocab, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    best, _ = fastest(CANDIDATES, lambda sizes: time_on_gpu(sizes, models))
    name = f"completion_loss/{launch.architecture_of(models[0].device)}"
    save(name, best, launch.tuned_file())
    launch.reread_tuned()
    print(f"kept {name}: {tuple(best)} in {launch.tuned_file()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

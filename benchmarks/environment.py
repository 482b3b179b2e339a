"""What a measurement depends on besides the code, recorded with every row."""

import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import allocator
from benchmarks.cases import Case
from deepalign.kernels.library import cpu_isa

CPUINFO = Path("/proc/cpuinfo")
COPIES = 8


def row_environment(implementation: str, device: str) -> dict[str, Any]:
    """Settings that differ between rows of one file: who ran, on which instruction set, with how many threads."""
    on_cpu = device == "cpu"
    return {
        "implementation": implementation,
        "device": device if on_cpu else torch.cuda.get_device_name(),
        "isa": cpu_isa() if implementation == "cpu" else torch_isa() if on_cpu else "",
        "torch_isa": torch_isa(),
        "threads": torch.get_num_threads(),
        "allocator": allocator.description() if on_cpu else "torch's caching allocator",
    }


def useful_traffic(row: Mapping[str, Any], case: Case, logits_moved: int) -> dict[str, float]:
    """What the operation cannot do without, `logits_moved` tensors of logits read or written once, over the row's time:
    GB/s, and percent of a copy on as many threads in the same process. Nothing for a row that was not timed."""
    if "median_ms" not in row:
        return {}
    moved = case.elements * getattr(torch, case.dtype).itemsize * logits_moved
    gbps = moved / row["median_ms"] / 1e6
    return {"useful_gbps": gbps, "percent_of_copy": 100 * gbps / copy_gbps(case.device)}


@lru_cache(maxsize=1)
def copy_gbps(device: str) -> float:
    """GB/s, read plus written, of the fastest of several copies of 256 MiB."""
    source = torch.ones(256 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best_s = math.inf
    for _ in range(COPIES):
        start = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * source.nbytes / best_s / 1e9


def machine() -> dict[str, Any]:
    """What is the same for a whole file."""
    return {
        "cpu_model": cpu_model(),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "libc": " ".join(platform.libc_ver()),
        },
        "system": sys.platform,
    }


def torch_isa() -> str:
    """The instruction set of torch's own kernels, in the library's words."""
    return torch.backends.cpu.get_cpu_capability().lower()


def cpu_model() -> str:
    """As the kernel names it, with family and model: virtual machines hide the marketing name."""
    try:
        lines = [line.split(":", 1) for line in CPUINFO.read_text(encoding="utf-8").splitlines() if ":" in line]
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, value in reversed(lines)}  # of the first processor
    name = fields.get("model name", platform.machine())
    family = f"family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return f"{name} {family}".strip()

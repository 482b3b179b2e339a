"""What a measurement depends on besides the code, recorded with every row."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import allocator
from deepalign.kernels.library import cpu_isa

CPUINFO = Path("/proc/cpuinfo")


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

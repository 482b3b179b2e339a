"""How the Triton kernels are launched: sizes per architecture. Nothing here is read before a kernel's first call.

`LAUNCH[operation][architecture]`; an architecture is a compute capability, "gfx942", ..., or "default". What
`python -m deepalign.kernels.tune` found on this machine comes first.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Sizes of a launch."""

    block: int  # entries of a tile
    warps: int
    share: int  # entries of a row that one program reads, about
    programs: int  # where fewer rows than this are there, they are split further


LAUNCH: dict[str, dict[str, Launch]] = {
    "completion_loss": {
        "default": Launch(block=2048, warps=8, share=32768, programs=216),
        "80": Launch(block=2048, warps=8, share=32768, programs=216),
        "90": Launch(block=2048, warps=8, share=32768, programs=264),
        "100": Launch(block=2048, warps=8, share=32768, programs=296),
        "gfx942": Launch(block=2048, warps=4, share=32768, programs=608),
    },
    "position_divergence": {"default": Launch(block=2048, warps=8, share=0, programs=0)},
    "contrastive_sample": {"default": Launch(block=2048, warps=8, share=2**30, programs=128)},
}


# Registers per thread. Left alone, the compiler stops at a round number of programs per multiprocessor, and spills a
# word or two to get there. 128: two programs of 256 threads.
SHARED_REGISTERS, ALL_REGISTERS = 128, 255


# Programs that may share a row and wait for each other: as many as the lanes of a warp that looks at what they publish.
MOST_TOGETHER = 32


def most_together(device: torch.device) -> int:
    """How many programs may wait for each other, a power of 2: so many that all of them always run at the same time.

    One per multiprocessor does, whatever a program takes of it. A part of a GPU may have only 14.
    """
    if device.type != "cuda":
        return MOST_TOGETHER
    count = _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)
    return min(MOST_TOGETHER, 1 << (count.bit_length() - 1))


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def at_most_registers(most: int) -> dict[str, int]:
    """Option of a launch; AMD's compiler knows no such one."""
    return {} if torch.version.hip else {"maxnreg": most}


def launch_of(operation: str, device: torch.device) -> Launch:
    """The sizes for an operation on a device."""
    table, architecture = LAUNCH[operation], architecture_of(device)
    return _tuned().get(f"{operation}/{architecture}") or table.get(architecture, table["default"])


def architecture_of(device: torch.device) -> str:
    """A key of the tables."""
    if device.type != "cuda":
        return "default"
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"{major}{minor}"


def tuned_file() -> Path:
    """Where tuned sizes are kept: $DEEPALIGN_CACHE, or ~/.cache/deepalign."""
    folder = os.environ.get("DEEPALIGN_CACHE") or Path.home() / ".cache" / "deepalign"
    return Path(folder) / "launch.json"


_kept: dict[str, Launch] | None = None  # what was tuned, once it is read


def _tuned() -> dict[str, Launch]:
    global _kept
    if _kept is None:
        reread_tuned()
    return _kept or {}


def reread_tuned() -> None:
    """Read what was tuned again."""
    global _kept
    path = tuned_file()
    try:
        _kept = {name: Launch(**sizes) for name, sizes in json.loads(path.read_text()).items()} if path.exists() else {}
    except (ValueError, TypeError, AttributeError) as error:
        raise RuntimeError(f"{path} is no table of launch sizes ({error}); remove it, or tune again") from error


def forget_tuned() -> None:
    """Use the tables alone, in this process."""
    global _kept
    _kept = {}


def split_of_rows(launch: Launch, rows: int, vocab: int, block: int, most: int = MOST_TOGETHER) -> int:
    """Into how many programs to split a row, a power of 2: so that a share fits, and a small batch fills the device."""
    split = 1
    while vocab > split * launch.share or (rows * split < launch.programs and vocab > 2 * split * block):
        split *= 2
    return min(split, most)

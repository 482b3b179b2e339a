"""The C library's allocator, held still: two settings, one for times and one for peak memory.

By default glibc maps every block above a threshold and unmaps it when it is freed, so each logits-sized temporary is
faulted in page by page: eager PyTorch, which makes 18 of them, then takes more than twice as long (measured, bf16
64 x 128256, one thread: 23 ns per element and 88000 page faults a call by default, 8.9 and none with `keep_memory`).
Times are taken with memory kept, where eager is at its best; peak memory with memory handed back, where it can be seen.
Huge pages for the heap (GLIBC_TUNABLES=glibc.malloc.hugetlb=1, read when a process starts) gave eager another 0 to 8%.
"""

import ctypes
import os
import resource

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # glibc's malloc.h
_TOP_PAD = 256 << 20
_MAPPED_FROM = 64 << 10
_described = "default"


def keep_memory() -> None:
    """Serve every block from a heap that only grows, so that no page is faulted in twice. Where that cannot be set
    (another C library, a preloaded allocator), nothing changes, and `description` says so."""
    _set(
        {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: _TOP_PAD},
        f"glibc, M_MMAP_MAX=0, M_TRIM_THRESHOLD=2^31-1, M_TOP_PAD={_TOP_PAD >> 20} MiB",
    )


def return_memory() -> None:
    """Map every block above 64 KiB on its own and unmap it when it is freed: resident memory is then memory in use.

    Raises:
        RuntimeError: that cannot be set (another C library, a preloaded allocator).
    """
    if not _set({_M_MMAP_THRESHOLD: _MAPPED_FROM}, f"glibc, M_MMAP_THRESHOLD={_MAPPED_FROM >> 10} KiB"):
        raise RuntimeError(f"peak memory needs glibc's own malloc; this process has: {description()}")


def trim() -> None:
    """Hand free memory back to the system now."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def description() -> str:
    """The allocator and its settings, for the record."""
    parts = [_described]
    if "GLIBC_TUNABLES" in os.environ:
        parts.append(os.environ["GLIBC_TUNABLES"])
    return ", ".join(parts)


def page_faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _set(options: dict[int, int], described: str) -> bool:
    global _described
    libc = _glibc()
    if libc is None:
        _described = f"preloaded {os.environ['LD_PRELOAD']}" if os.environ.get("LD_PRELOAD") else "default, not glibc"
        return False
    refused = [option for option, value in options.items() if libc.mallopt(option, value) != 1]
    assert not refused, f"mallopt refused options {refused}"
    _described = described
    return True


def _glibc() -> ctypes.CDLL | None:
    """The C library, if its malloc is the one that serves."""
    if os.environ.get("LD_PRELOAD"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None

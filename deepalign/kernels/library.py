"""The ops of namespace `deepalign`, as `torch.library` knows them.

Schemas, fake kernels and autograd are written in Python, one `op.py` per operation; the kernels of each device join
under the op's name: the CPU's are compiled (`csrc/`) and register themselves when the extension is loaded here, the
GPU's are Triton's (`*/triton.py`) and imported when the first call needs them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Also keeps the registrations alive.
LIBRARY = torch.library.Library("deepalign", "FRAGMENT")


def _load_native() -> str | None:
    """Load the compiled CPU kernels; the reason why they cannot run, None if they can."""
    found = sorted(Path(__file__).resolve().parent.parent.glob("_native*.so"))
    if not found:
        return (
            "the native kernels were not built (install deepalign where torch is installed and a C++17 compiler is "
            "at hand: pip install .)"
        )
    try:
        torch.ops.load_library(str(found[0]))
        torch.ops.deepalign.cpu_isa()
    except (OSError, RuntimeError) as error:
        return f"the native kernels in {found[0].name} do not load: {error}"
    return None


LIBRARY.define("cpu_isa() -> str")
LIBRARY.define("has_gemm_bf16() -> bool")
WHY_NO_NATIVE = _load_native()


def _why_no_triton() -> str | None:
    """The reason why there is no Triton, None if there is; it is not imported to ask."""
    try:
        found = find_spec("triton") is not None
    except (ImportError, ValueError):  # who keeps it out may raise instead
        found = False
    return None if found else "triton is not installed (pip install 'triton>=3.6')"


WHY_NO_TRITON = _why_no_triton()


def implement_on_gpu(operation: str, *names: str) -> None:
    """Register functions of `deepalign.kernels.<operation>.triton` as the GPU kernels of the ops of the same names."""
    for name in names:
        LIBRARY.impl(name, _imported_when_called(f"deepalign.kernels.{operation}.triton", name), "CUDA")


def _imported_when_called(module: str, name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, wherever the tensors are
            return getattr(import_module(module), name)(*arguments)

    return call


def cpu_isa() -> str | None:
    """The instruction set that serves on the CPU ("avx512", "avx2" or "portable"), None without native kernels.

    It is the best that the processor runs; the environment variable DEEPALIGN_CPU_ISA, read once, forces another.
    """
    return None if WHY_NO_NATIVE else torch.ops.deepalign.cpu_isa()


@contextmanager
def autograd_inside_an_op() -> Iterator[None]:
    """Let operations record for autograd although the caller is an op's kernel, which runs below it.

    The reference implementations differentiate by autograd; what they record never leaves them.
    """
    keys, excluded = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def dense_rows(logits: Tensor) -> Tensor:
    """(..., V) as (N, V) with stride 1 in the vocabulary, which compiled kernels take; copied only if it must be."""
    if logits.dim() != 2:
        logits = logits.reshape(-1, logits.shape[-1])
    if logits.stride(-1) == 1 or logits.shape[-1] == 1:
        return logits
    return logits.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves an empty one as it is


def index_rows(indices: Tensor) -> Tensor:
    """(..., K) as (N, K); K may be 0."""
    return indices.reshape(prod(indices.shape[:-1]), indices.shape[-1])

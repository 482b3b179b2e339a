"""What the public operations accept, checked once at their boundary.

Every message says what came, what is expected and what to do. Checks that must read tensor values run only on CPU
tensors and not while compiling: on a GPU they would stall the stream, under `torch.compile` they would break the graph.
"""

import math
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# From fastest to slowest; the first that can run on the device serves when the caller names none.
PREFERRED_IMPLEMENTATIONS = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
# Compiled kernels: the device they run on, and what they take. "reference" runs anywhere and takes float64 too.
COMPILED_FOR = {"cpu": "cpu", "triton": "cuda"}
COMPILED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Implementation = TypeVar("Implementation")
_reference_announced = False


def check_logits(vocab_size: int | None, **logits: Tensor) -> int:
    """Check that the named logits agree with each other, and return how many of their entries exist.

    Args:
        vocab_size: number of leading entries that exist, None for all of them.
        **logits: (..., V) each, of one shape, dtype and device; the keywords name them in the messages.

    Raises:
        TypeError: one is not a tensor, not bf16/fp16/fp32/fp64, or their dtypes differ; `vocab_size` is not an int.
        ValueError: one is a DTensor or has no vocabulary dimension, shapes or devices differ, or `vocab_size` is not
            in [1, V].
    """
    for name, tensor in logits.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor of logits (..., V)")
        if tensor.dtype not in LOGITS_DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; expected one of {_names(LOGITS_DTYPES)}: convert it first"
            )
        if (spread := placements(tensor)) is not None:
            raise ValueError(
                f"{name} is a DTensor {spread}; expected a plain tensor of whole rows: pass "
                ".full_tensor(), or .to_local() where only tokens are sharded"
            )
        check_dense(name, tensor)
        if tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected (..., V) with at least one vocabulary entry"
            )
    first_name, first = next(iter(logits.items()))
    for name, tensor in logits.items():
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} and {first_name} is {first.dtype}; expected one dtype: "
                "convert them to the wider one"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first_name} is on {first.device}; expected one device: move one"
            )
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and {first_name} has {tuple(first.shape)}; expected one "
                "shape: if one vocabulary is padded, slice all logits to the entries that they share"
            )
    return check_vocab_size(vocab_size, first.shape[-1])


def placements(tensor: Tensor) -> object | None:
    """How a DTensor is spread over devices, None for other tensors; asked so that nothing distributed is imported."""
    return getattr(tensor, "placements", None) if hasattr(tensor, "device_mesh") else None


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a sparse or nested tensor."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} is {kind}; expected a dense tensor: convert it, for example with .to_dense()")


def check_vocab_size(vocab_size: int | None, width: int) -> int:
    """Return the number of entries that exist in logits `width` wide.

    Raises:
        TypeError: `vocab_size` is not an int.
        ValueError: it is not in [1, width].
    """
    if vocab_size is None:
        return width
    check_int("vocab_size", vocab_size)
    if not 1 <= vocab_size <= width:
        raise ValueError(
            f"vocab_size is {vocab_size} but the logits are {width} wide; expected 1 <= vocab_size <= {width}: "
            "pass the tokenizer's size, or None"
        )
    return vocab_size


def check_top(name: str, value: int, vocab_size: int) -> None:
    """Check a number of largest entries, `top_k` or `top_n`, against the entries that exist.

    Raises:
        TypeError: not an int.
        ValueError: not in [1, vocab_size].
    """
    check_int(name, value)
    if not 1 <= value <= vocab_size:
        raise ValueError(
            f"{name} is {value} but {vocab_size} vocabulary entries exist; expected 1 <= {name} <= {vocab_size}: "
            "lower it"
        )


def check_int(name: str, value: object) -> None:
    """Raise TypeError unless `value` is an int (True and False are not)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected an int")


def check_number(name: str, value: object, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
    """Check a finite real number with `value >= minimum` and `value > above`.

    Raises:
        TypeError: not a real number.
        ValueError: NaN, infinite or too small.
    """
    # The first two say the same; asking an abstract class takes ten times as long.
    if type(value) is not float and type(value) is not int and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected a number")
    try:
        number = float(value)
    except OverflowError:  # an int that no double holds
        number = math.inf
    # Compared rather than given to math.isfinite: under torch.compile the number may be symbolic.
    if not (-math.inf < number < math.inf and number >= minimum and number > above):
        bound = f" > {above:g}" if above > -math.inf else f" >= {minimum:g}" if minimum > -math.inf else ""
        raise ValueError(f"{name} is {value!r}; expected a finite number{bound}")


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError unless the condition holds that `value` was to meet; `expected` says it in words."""
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {expected}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise TypeError unless `value` is a string, ValueError unless it is one of `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected one of {_names(choices)}")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {_names(choices)}")


def check_row_weight(name: str, weight: Tensor | None, logits: Tensor) -> Tensor:
    """Return one weight per row of `logits`, detached, in the dtype the rows are computed in; None means 1.

    Args:
        name: the argument's name, for messages.
        weight: (...,) bool, integer or floating, >= 0, or None.
        logits: (..., V) the logits whose rows are weighed.

    Returns:
        (...,) float32, or float64 for float64 logits.

    Raises:
        TypeError: not a tensor, or complex.
        ValueError: wrong shape or device; a negative, NaN or infinite weight (seen on CPU tensors only).
    """
    dtype = compute_dtype(logits)
    rows = logits.shape[:-1]
    if weight is None:
        return torch.ones(rows, dtype=dtype, device=logits.device)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} is a {type(weight).__name__}; expected a torch.Tensor of shape {tuple(rows)}, or None")
    if weight.is_complex():
        raise TypeError(f"{name} has dtype {weight.dtype}; expected a bool, integer or floating dtype")
    if weight.shape != rows:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; expected {tuple(rows)}, one weight per row of logits "
            f"{tuple(logits.shape)}"
        )
    if weight.device != logits.device:
        raise ValueError(
            f"{name} is on {weight.device} and the logits on {logits.device}; expected one device: move it"
        )
    if weight.requires_grad:
        weight = weight.detach()
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    # As a list: the few operations on tensors that would do it cost more, after other code had the caches.
    if can_read_values(weight) and not all(0 <= value < math.inf for value in weight.flatten().tolist()):
        raise ValueError(
            f"{name} has a negative, NaN or infinite entry; expected finite weights >= 0: use 0 to leave a row out"
        )
    return weight


def check_top_k_indices(indices: Tensor | None, logits: Tensor, vocab_size: int) -> None:
    """Check a selection given by the caller.

    Args:
        indices: (..., K) int64, -1 for none, or None.
        logits: (..., V) the logits it selects from.
        vocab_size: number of entries that exist.

    Raises:
        TypeError: not an int64 tensor.
        ValueError: wrong shape or device; a value outside [-1, vocab_size) (seen on CPU tensors only).
    """
    if indices is None:
        return
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        given = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"top_k_indices is {given}; expected an int64 tensor (..., K): convert it with .long()")
    if indices.dim() != logits.dim() or indices.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"top_k_indices has shape {tuple(indices.shape)}; expected {(*logits.shape[:-1], 'K')}, a selection per row"
        )
    if indices.device != logits.device:
        raise ValueError(
            f"top_k_indices is on {indices.device} and the logits on {logits.device}; expected one device: move it"
        )
    if can_read_values(indices) and not bool(((indices >= -1) & (indices < vocab_size)).all()):
        raise ValueError(
            f"top_k_indices has an entry outside [-1, {vocab_size}); expected vocabulary entries that "
            "exist, or -1 for none"
        )


def choose_implementation(
    implementations: Mapping[str, Implementation | str],
    name: str | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Implementation:
    """Return the implementation that serves a call: the one of `implementation_name`."""
    chosen = implementations[implementation_name(implementations, name, device, dtype)]
    assert not isinstance(chosen, str)
    return chosen


def implementation_name(
    implementations: Mapping[str, object],
    name: str | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Return the name of the implementation that serves a call.

    Args:
        implementations: by name, the implementation, or a sentence that says why it cannot run.
        name: the one the caller wants, or None for the fastest that can run.
        device: where the inputs are.
        dtype: what the logits are.

    Raises:
        TypeError: `name` is not a string.
        ValueError: no such implementation.
        RuntimeError: it exists but cannot run; the message has the reason.
    """
    if name is None:
        for preferred in PREFERRED_IMPLEMENTATIONS.get(device.type, ("reference",)):
            if _obstacle(implementations, preferred, device, dtype) is None:
                if preferred == "reference":
                    _announce_reference(device, dtype)
                return preferred
    check_choice("implementation", name, tuple(implementations))
    assert name is not None, "the reference runs anywhere"
    obstacle = _obstacle(implementations, name, device, dtype)
    if obstacle is not None:
        runnable = tuple(n for n in implementations if _obstacle(implementations, n, device, dtype) is None)
        raise RuntimeError(f"implementation {name!r} cannot run: {obstacle}; use one of {_names(runnable)}, or None")
    return name


def _obstacle(implementations: Mapping[str, object], name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot serve such logits, None if it can."""
    found = implementations.get(name, "no such implementation")
    if isinstance(found, str):
        return found
    home = COMPILED_FOR.get(name)
    if home is not None and device.type != home:
        return f"it takes {home} tensors, and these are on {device}"
    if home is not None and dtype not in COMPILED_DTYPES:
        return f"it takes {_names(COMPILED_DTYPES)}, and these are {dtype}"
    return None


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The dtype rows are computed in: float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def is_plain(tensor: object) -> bool:
    """Whether it is a tensor of no special class, on the CPU, without a gradient: what an op may be given as it is."""
    return type(tensor) is Tensor and tensor.is_cpu and not tensor.requires_grad


def can_read_values(tensor: Tensor) -> bool:
    """Whether looking at the values costs no device synchronisation and breaks no traced or compiled graph."""
    # A tracer's tensors are of classes of their own.
    return type(tensor) in (Tensor, Parameter) and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def storable(tensor: Tensor, *, copy: bool = True) -> Tensor:
    """What autograd may save of a tensor made under `torch.inference_mode`, which it refuses to; others as they are.

    Args:
        tensor: an inference tensor that carries no gradient, or any other.
        copy: whether it is copied, or a tensor that shares its memory returned, which nobody may overwrite.
    """
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or not tensor.is_inference()
        or tensor.requires_grad
    ):
        return tensor
    if copy:
        return tensor.clone()
    return tensor.new_empty(0).set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _announce_reference(device: torch.device, dtype: torch.dtype) -> None:
    global _reference_announced
    # The compiler is asked first: a compiled caller must not depend on the flag, or its change would recompile it.
    if torch.compiler.is_compiling() or _reference_announced:
        return
    _reference_announced = True
    warnings.warn(
        f"deepalign runs its eager reference implementation on {device.type} for {dtype}: no faster one can run there. "
        "Pass implementation='reference' to choose it without this notice.",
        stacklevel=5,
    )


def _names(items: tuple[Any, ...]) -> str:
    return ", ".join(repr(item) if isinstance(item, str) else str(item) for item in items)


def check_filters(top_k: int, top_p: float, min_p: float) -> None:
    """Check what a sampler keeps of a distribution.

    Raises:
        TypeError: `top_k` is not an int, or one of the others not a number.
        ValueError: `top_k` < 0, `top_p` not in (0, 1], `min_p` not in [0, 1].
    """
    check_int("top_k", top_k)
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; expected an int >= 0: 0 keeps every entry")
    check_number("top_p", top_p, above=0.0)
    check_number("min_p", min_p, minimum=0.0)
    if top_p > 1:
        raise ValueError(f"top_p is {top_p!r}; expected a number in (0, 1]: 1 keeps every entry")
    if min_p > 1:
        raise ValueError(f"min_p is {min_p!r}; expected a number in [0, 1]: 0 keeps every entry")


def check_randomness(generator: torch.Generator | None, uniforms: Tensor | None, logits: Tensor) -> None:
    """Check where a sampler's uniforms come from.

    Args:
        generator: on the type of device that the logits are on, or None.
        uniforms: (...,) floating, in [0, 1), or None.
        logits: (..., V) the logits to sample from.

    Raises:
        TypeError: not a generator; not a tensor, or not a floating one.
        ValueError: both given; wrong shape or device; a value outside [0, 1) or NaN (seen on CPU tensors only).
    """
    if generator is not None:
        _check_generator(generator, logits)
    if uniforms is None:
        return
    rows = logits.shape[:-1]
    if not isinstance(uniforms, Tensor) or not uniforms.is_floating_point():
        given = uniforms.dtype if isinstance(uniforms, Tensor) else f"a {type(uniforms).__name__}"
        raise TypeError(f"uniforms is {given}; expected a floating tensor of shape {tuple(rows)}, or None")
    if generator is not None:
        raise ValueError("generator and uniforms are both given; expected at most one: uniforms need no generator")
    if uniforms.shape != rows:
        raise ValueError(
            f"uniforms has shape {tuple(uniforms.shape)}; expected {tuple(rows)}, one value per row of logits "
            f"{tuple(logits.shape)}"
        )
    if uniforms.device != logits.device:
        raise ValueError(
            f"uniforms is on {uniforms.device} and the logits on {logits.device}; expected one device: move it"
        )
    if can_read_values(uniforms) and not all(0 <= value < 1 for value in uniforms.flatten().tolist()):
        raise ValueError("uniforms has an entry outside [0, 1) or NaN; expected values as torch.rand draws them")


def _check_generator(generator: torch.Generator, logits: Tensor) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; expected a torch.Generator, or None")
    if generator.device.type != logits.device.type:
        raise ValueError(
            f"generator is on {generator.device} and the logits on {logits.device}; expected one device: make it with "
            f"torch.Generator({str(logits.device)!r})"
        )

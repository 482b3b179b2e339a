"""The Triton kernels on a CPU, in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/triton`, a part of `make
test`.

Triton decides at its first import whether it interprets, so these tests need a process of their own.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator

import pytest
import torch

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETS else ["test_*.py"]


def _interpret_without_repetition() -> None:
    """Two thirds of the interpreter's time went with what it does over and over, of which nothing comes.

    At each call of a device function it looks through all of `triton.language` for what to replace, all of which the
    launch has replaced; at each operation it writes the table of numpy's types anew; and it does the arithmetic of
    integers again in 64 bits for an assertion that is made in its debug mode alone. A version of Triton whose
    interpreter has other names for these is left as it is.
    """
    from triton import language
    from triton.runtime import interpreter

    names = ("_patch_lang", "_get_np_dtype", "interpreter_builder")
    if not all(hasattr(interpreter, name) for name in names):
        return
    replace: Callable[[Callable[..., object]], object] = interpreter._patch_lang
    scope = getattr(interpreter, "_LangPatchScope", lambda: None)

    def replace_once(function: Callable[..., object]) -> object:
        # the standard library's functions see the second of these modules, kernels the first
        replaced = not any(language.core.is_builtin(module.load) for module in (language, language.core))
        return scope() if replaced else replace(function)

    numpy_type: Callable[[object], object] = interpreter._get_np_dtype
    known: dict[str, object] = {}

    def known_type(of: language.dtype) -> object:
        name = of.scalar.name
        if name not in known:
            known[name] = numpy_type(of.scalar)
        return known[name]

    interpreter._patch_lang = replace_once
    interpreter._get_np_dtype = known_type
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


if INTERPRETS:
    _interpret_without_repetition()


@pytest.fixture(autouse=True)
def _every_buffer_poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every buffer is full of NaN, or of the largest integer, before a kernel writes it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")  # as `use_deterministic_algorithms`, which imports the compiler
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.set_deterministic_debug_mode(before)

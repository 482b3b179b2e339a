"""What the Triton kernels compile to, without a GPU: registers, spills, width of loads and stores, issue slots."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # as the launchers ask for it

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Loop:
    """A loop without another in it."""

    instructions: int
    kinds: Counter[str]

    def count(self, *prefixes: str) -> int:
        """How many instructions begin with one of these."""
        return sum(number for kind, number in self.kinds.items() if kind.startswith(prefixes))


@dataclass(frozen=True)
class Machine:
    """What one kernel became."""

    registers: int
    stack: int
    shared: int
    loops: list[Loop]
    whole: Loop


def compiled(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], target: str, **options: Any) -> Any:
    """A kernel compiled for a target.

    Args:
        kernel: a `triton.jit` function.
        types: of every argument that is no constant: "*bf16", "i32", "fp32"; a trailing ":16" says that it is a
            multiple of 16, as the launcher would find, if it looks.
        constants: by name.
        target: of `TARGETS`.
    """
    names = kernel.arg_names
    signature = {name: types[name].removesuffix(":16") if name in types else "constexpr" for name in names}
    looked_at = {one.name for one in kernel.params if not one.do_not_specialize_on_alignment}
    whole = [name for name, kind in types.items() if kind.endswith(":16") and name in looked_at]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in whole}
    source = ASTSource(kernel, signature=signature, constexprs=dict(constants), attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=dict(options))


def machine(binary: Any) -> Machine:
    """Read the SASS of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        text = _tool("cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, shared, local = (int(number) for number in found.groups())
    lines = [(int(at, 16), code) for at, code in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*?)\s*;", text)]
    return Machine(registers, stack + local, shared, _loops(lines), _loop(lines))


def _loops(lines: list[tuple[int, str]]) -> list[Loop]:
    spans = []
    for at, code in lines:
        jump = re.search(r"BRA(?:\.\w+)* (?:!?U?P\d+, )?0x([0-9a-f]+)", code)
        if jump and int(jump[1], 16) < at:
            spans.append((int(jump[1], 16), at))
    inner = [span for span in spans if not any(span[0] <= a and b < span[1] for a, b in spans if (a, b) != span)]
    return [_loop([line for line in lines if first <= line[0] <= last]) for first, last in sorted(set(inner))]


def _loop(lines: list[tuple[int, str]]) -> Loop:
    kinds = Counter(re.sub(r"^@!?U?P\w+\s+", "", code).split()[0] for _, code in lines)
    return Loop(len(lines), kinds)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout

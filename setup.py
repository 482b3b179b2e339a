"""Builds the native CPU kernels; everything declarative is in pyproject.toml.

They need a C++17 compiler and the headers of an installed torch >= 2.11. Where either is missing the package installs
without them and says so: the eager reference implementation then serves. The extension uses only torch's stable ABI and
no part of Python's, so that one build serves later versions of both.
"""

import os
import sys
import sysconfig
from glob import glob
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_2_11 = "0x020b000000000000"


def torch_folder() -> Path | None:
    """The installed torch, found without importing it: an isolated build environment does not see it."""
    for folder in (*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        torch = Path(folder) / "torch"
        if (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return torch
    return None


class BuildNative(build_ext):
    """Compiles the sources side by side, and says in one line what a package without native kernels means."""

    def build_extensions(self) -> None:
        compile_in_turn = self.compiler.compile

        def compile_side_by_side(sources: list[str], **options: object) -> list[str]:
            with ThreadPool(min(len(sources), os.cpu_count() or 1)) as pool:
                return list(chain(*pool.map(lambda source: compile_in_turn([source], **options), sources, chunksize=1)))

        self.compiler.compile = compile_side_by_side
        super().build_extensions()

    def run(self) -> None:
        super().run()
        if not all(Path(self.get_ext_fullpath(extension.name)).is_file() for extension in self.extensions):
            print("deepalign: the native CPU kernels were not built; the eager reference implementation will serve")


def native(torch: Path) -> Extension:
    extra_flags = os.environ.get("DEEPALIGN_CXXFLAGS", "").split()  # for example sanitizers
    return Extension(
        "deepalign._native",
        sources=["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
        include_dirs=["csrc", str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        # No contraction: a - b must be 0 where a == b, and results must not depend on what a compiler fuses.
        # Instructions in the order of the source: csrc/cpu/vec_pair.h. Clang passes over both with a warning.
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-ffp-contract=off",
            "-fno-tree-ter",
            "-fno-schedule-insns2",
            "-fvisibility=hidden",
            "-g0",
            *extra_flags,
        ],
        extra_link_args=extra_flags,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_2_11)],
        py_limited_api=True,
        optional=True,
    )


left_out = bool(os.environ.get("DEEPALIGN_NO_NATIVE"))
torch = None if left_out else torch_folder()
if left_out:
    print("deepalign: the native CPU kernels are left out, as DEEPALIGN_NO_NATIVE asks")
elif torch is None:
    print("deepalign: no torch >= 2.11 to build against: install torch first to get the native CPU kernels")
setup(
    ext_modules=[] if torch is None else [native(torch)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

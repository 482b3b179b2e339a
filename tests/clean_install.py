"""Builds the source distribution, a wheel from it, and tries the wheel in new virtual environments: `make package`.

    python -m tests.clean_install --torch 2.13.0 2.11.0

The wheel is built against the torch that is installed here and used with each that is named: each environment gets that
torch, the wheel and pytest, nothing else, imports the package in under a second once torch is loaded, and passes the
tests of the native kernels, which take the installed package before the checkout's.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORT = (
    "import time, torch; start = time.perf_counter(); import deepalign; deepalign.fused_completion_loss\n"
    "seconds = time.perf_counter() - start\n"
    "from deepalign.kernels.library import cpu_isa\n"
    "print(f'torch {torch.__version__}, {deepalign.__file__}: imported in {seconds:.2f} s, {cpu_isa()} kernels')\n"
    "assert seconds < 1 and cpu_isa()"
)


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], cwd=cwd, check=True)


def build(folder: Path) -> Path:
    """The wheel, built from an unpacked source distribution."""
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder)
    (source,) = folder.glob("*.tar.gz")
    pip_wheel = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, *pip_wheel, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    return wheel


def try_in(environment: Path, wheel: Path, torch: str, pip_flags: Sequence[str]) -> None:
    """The wheel in a new environment with one version of torch."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *pip_flags)
    run(*install, f"torch=={torch}", "numpy")
    run(*install, "--no-deps", wheel)
    run(*install, "pytest", "pytest-timeout", "pytest-benchmark")
    run(python, "-P", "-c", IMPORT, cwd=environment)
    site = next((environment / "lib").glob("python*/site-packages"))
    # what needs transformers, peft or a compiler is left out: this environment has none
    selection = ("-k", "(native or cpu) and not compile", "--ignore", "tests/kernels/test_lm_head.py")
    run(python, "-P", "-m", "pytest", "-o", f"pythonpath={site} .", "tests/kernels", "-q", "--no-header", *selection)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", required=True, help="versions to try the wheel with")
    parser.add_argument("--pip-flags", default="", help="options for pip, as one word")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        for version in options.torch:
            try_in(folder / f"torch-{version}", wheel, version, options.pip_flags.split())
    print(f"{wheel.name} works with torch {', '.join(options.torch)}")


if __name__ == "__main__":
    main()

"""What a result was made with."""

import importlib.metadata
import sys

from deepalign import __version__

PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "accelerate", "deepspeed", "lm-eval", "judgezoo")


def versions() -> dict[str, str]:
    """Versions of Python, this package and those that decide a result, as far as they are installed."""
    found = {"deepalign": __version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

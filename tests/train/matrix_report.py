"""The result of the matrix as JSON and as a table."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from tests.train.matrix import GRADIENT_TOLERANCE, LEVELS, LOSS_TOLERANCE, Cell, Error

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft")


def within_tolerance(error: Error) -> bool:
    """Whether a cell is the reference's training."""
    return error.loss <= LOSS_TOLERANCE and error.gradient <= GRADIENT_TOLERANCE


def write_report(errors: Mapping[Cell, Error], folder: Path, seconds: float | None) -> list[Cell]:
    """`training-matrix.json` (every cell) and `training-matrix.md` (the worst of each group); returns the bad cells."""
    folder.mkdir(parents=True, exist_ok=True)
    bad = [cell for cell, error in errors.items() if not within_tolerance(error)]
    result = {
        "tolerance": {"loss": LOSS_TOLERANCE, "gradient": GRADIENT_TOLERANCE},
        "versions": {name: version(name) for name in PACKAGES},
        "seconds": None if seconds is None else round(seconds),
        "cells": {cell.name: [float(f"{value:.2g}") for value in error] for cell, error in errors.items()},
    }
    text = json.dumps(result, indent=1).replace("[\n   ", "[").replace(",\n   ", ", ").replace("\n  ]", "]")
    (folder / "training-matrix.json").write_text(text + "\n")
    (folder / "training-matrix.md").write_text(table(errors, bad))
    return bad


def table(errors: Mapping[Cell, Error], bad: list[Cell]) -> str:
    """The worst errors by stage, what is trained, and family, over accumulation, ranks and form."""
    families = LEVELS[2]
    lines = [
        "# The training matrix",
        "",
        f"{len(errors)} cells, {len(bad)} out of tolerance. Worst error of the loss / of the gradients (the change of",
        "all parameters over three steps of SGD), relative to a single-process float64 reference, over accumulation 1",
        f"and 4, 1 and 2 ranks, and both forms of the loss. Tolerances {LOSS_TOLERANCE:.0e}, {GRADIENT_TOLERANCE:.0e}.",
        "`make matrix` makes this file; every cell is in `training-matrix.json`.",
        "",
        ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "",
        "| ZeRO | trained | " + " | ".join(families) + " |",
        "|---|---|" + "---|" * len(families),
    ]
    for zero in LEVELS[0]:
        for adaptation in LEVELS[1]:
            cells = []
            for family in families:
                group = [e for c, e in errors.items() if (c.zero, c.adaptation, c.family) == (zero, adaptation, family)]
                worst = Error(*(max(values) for values in zip(*group, strict=True))) if group else None
                cells.append("" if worst is None else f"{worst.loss:.1e} / {worst.gradient:.1e}")
            lines.append(f"| {zero} | {adaptation} | " + " | ".join(cells) + " |")
    if bad:
        lines += ["", "Out of tolerance: " + ", ".join(cell.name for cell in bad)]
    return "\n".join(lines) + "\n"

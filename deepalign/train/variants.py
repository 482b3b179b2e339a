"""Variants of a configuration: named blocks of changes in one YAML file, one of them chosen.

    variant: recommended          # --variant literal chooses the other
    variants:
      literal: {distill_on: utility}
      recommended: {distill_on: both, loss: {favored_from: student}}

A variant's values replace those of the file; the command line replaces both.
"""

from collections.abc import Sequence
from typing import Any

VARIANT, VARIANTS = "variant", "variants"


def choose_variant(
    values: dict[str, Any], overrides: Sequence[tuple[str, Any]]
) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """A configuration's values with the chosen variant's in them, and the overrides that are left to apply.

    Args:
        values: what the YAML file holds; `variant` and `variants` are taken out.
        overrides: (key, value) of the command line; the last `variant` among them decides.

    Raises:
        ValueError: `variants` is no mapping of mappings, or the chosen name is not in it.
    """
    remaining = [(key, value) for key, value in overrides if key != VARIANT]
    chosen = next((value for key, value in reversed(overrides) if key == VARIANT), values.get(VARIANT))
    variants = values.get(VARIANTS, {})
    if not isinstance(variants, dict) or not all(isinstance(changes, dict) for changes in variants.values()):
        raise ValueError(f"{VARIANTS} must hold a block of keys per name, got {variants!r:.80}")
    values = {key: value for key, value in values.items() if key not in (VARIANT, VARIANTS)}
    if chosen is None:
        if variants:
            raise ValueError(f"the configuration has variants but chooses none; set {VARIANT} to {_names(variants)}")
        return values, remaining
    if chosen not in variants:
        raise ValueError(f"{VARIANT} is {chosen!r}; this configuration has {_names(variants)}")
    return _merged(values, variants[chosen]), remaining


def _names(variants: dict[str, Any]) -> str:
    return " or ".join(map(str, variants)) or "no variants"


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged

"""Attacks and utility, each rate as a count with its interval."""

from deepalign.evaluate.generation import greedy_continuations
from deepalign.evaluate.prefill import OUTCOMES, AttackExample, Judge, Outcome, PrefillResult, prefill_attack
from deepalign.evaluate.statistics import format_rate, wilson_interval

__all__ = [
    "OUTCOMES",
    "AttackExample",
    "Judge",
    "Outcome",
    "PrefillResult",
    "format_rate",
    "greedy_continuations",
    "prefill_attack",
    "wilson_interval",
]

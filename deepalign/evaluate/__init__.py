"""Attacks, judges and utility, each rate as a count with its interval; see docs/evaluation.md."""

from deepalign.evaluate.answers import AnswerOptions
from deepalign.evaluate.generation import Contrast, continuations, greedy_continuations
from deepalign.evaluate.judges import make_judge
from deepalign.evaluate.outcomes import OUTCOMES, SCOPES, AttackExample, BatchJudge, Judge, JudgedText, Outcome, Scope
from deepalign.evaluate.prefill import PrefillResult, prefill_attack
from deepalign.evaluate.statistics import format_rate, wilson_interval

__all__ = [
    "OUTCOMES",
    "SCOPES",
    "AnswerOptions",
    "AttackExample",
    "BatchJudge",
    "Contrast",
    "Judge",
    "JudgedText",
    "Outcome",
    "PrefillResult",
    "Scope",
    "continuations",
    "format_rate",
    "greedy_continuations",
    "make_judge",
    "prefill_attack",
    "wilson_interval",
]

"""What the native kernels are asked to reach, and which row of the results each figure is about.

On an AVX-512 machine with one thread, through the public functions with `.backward()`: how many times faster than the
straightforward eager and compiled peers. Of every machine: forward only against forward and backward, and memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import LOSS_CASES, MEMORY_CASES, SAMPLING_CASES
from benchmarks.linear import FROZEN

LOSS_BARS = {
    "bfloat16-64x128256": {"eager": 17.0, "compile": 9.0},
    "bfloat16-16x151936": {"eager": 17.0, "compile": 9.0},
    "bfloat16-64x151936": {"eager": 17.0, "compile": 9.0},
    "float32-64x128256": {"eager": 11.0, "compile": 5.5},
    "bfloat16-64x32000": {"eager": 13.0, "compile": 8.5},
}
FORWARD_BAR = {"forward_backward": 1.5}
SAMPLER_BARS = {("bfloat16-1x128256", filters): {"eager": 18.0} for filters in ("top_k", "top_k+top_p")}
# Of any number of threads: whole answers against `transformers`' generate, and a draw within 3% of the two forwards.
SAMPLING_BARS = {"sampling_generate": {"generate": 1.5}, "sampling_step": {"two_forwards": 1 / 0.03}}
# In units of one logits tensor. In place it is 0: 0.01 leaves room for what the measurement cannot tell from it.
# The linear loss: at most 1.10 times the bare products by every route to a float32 result, 1/6 of eager's peak memory.
LINEAR_BARS = {"products_native_bf16": 1 / 1.10, "products_blocks": 1 / 1.10}
LINEAR_MEMORY_BARS = {"eager_float32": 6.0}
MEMORY_BARS = {"forward": 0.01, "forward_backward": 1.05, "forward_backward_inplace": 0.01}


@dataclass(frozen=True)
class Verdict:
    """One figure against its bar."""

    name: str
    value: float
    bar: float
    met: bool

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3g} against {self.bar:.3g}: {'met' if self.met else 'missed'}"


def speed_bars(row: Mapping[str, Any]) -> dict[str, float]:
    """Least ratio asked of a timed row, by peer."""
    if row["implementation"] != "cpu":
        return {}
    if row["operation"] in SAMPLING_BARS:
        return SAMPLING_BARS[row["operation"]] if row["case"] in map(str, SAMPLING_CASES) else {}
    if row["operation"] == "linear_completion_loss":
        return LINEAR_BARS if row["case"] == str(FROZEN) else {}
    if row["operation"] == "completion_loss" and row["mode"] == "forward":
        return FORWARD_BAR if row["case"] in map(str, LOSS_CASES) else {}
    if (row["isa"], row["threads"]) != ("avx512", 1):
        return {}
    if row["operation"] == "completion_loss" and row["mode"] == "forward_backward":
        return LOSS_BARS.get(row["case"], {})
    if row["operation"] == "contrastive_sample":
        return SAMPLER_BARS.get((row["case"], row["mode"]), {})
    return {}


def verdicts(row: Mapping[str, Any]) -> list[Verdict]:
    """What the bars say of a row; nothing for a row without a bar."""
    if "peak_extra_logits" in row:
        if row["implementation"] != "cpu" or row["case"] not in map(str, MEMORY_CASES):
            return []
        bar, value = MEMORY_BARS[row["mode"]], row["peak_extra_logits"]
        return [Verdict("memory", value, bar, value <= bar)]
    if "peak_extra_mib" in row:
        if row["case"] != str(FROZEN) or row["implementation"] != "linear":
            return []
        ratios = {name: row["eager_mib"][name] / row["peak_extra_mib"] for name in LINEAR_MEMORY_BARS}
        return [
            Verdict(f"{name} memory", ratios[name], bar, ratios[name] >= bar)
            for name, bar in LINEAR_MEMORY_BARS.items()
        ]
    found = ((name, row["peers"][name]["ratio"], bar) for name, bar in speed_bars(row).items() if name in row["peers"])
    return [Verdict(name, value, bar, value >= bar) for name, value, bar in found]

"""Metrics of a training: sums over the steps since the last log, all ranks; the course of the mean logit; speed."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepalign.data.steps import Batch
from deepalign.train.completion_forward import SUMS


class StepMetrics:
    """Sums of `SUMS` over this rank's rows. A step's sums count once it is known that the step was taken."""

    def __init__(self, world_size: int, device: torch.device) -> None:
        self.world_size, self.device = world_size, device
        self.steps = 0
        self.total, self.step = self._zeros(), self._zeros()

    def _zeros(self) -> Tensor:
        return torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)

    def add(self, sums: Tensor) -> None:
        """Sums of a micro-batch of the step under way."""
        self.step += sums

    def end_step(self, taken: bool) -> None:
        """The step under way is over; a step that was skipped leaves no trace."""
        if taken:
            self.total += self.step
            self.steps += 1
        self.step = self._zeros()

    def drain(self) -> dict[str, float]:
        """Metrics since the last call: the two terms per step, the rest per row; empty if no step was taken."""
        total, steps = self.total, self.steps
        self.total, self.steps = self._zeros(), 0
        if self.world_size > 1:
            dist.all_reduce(total)
        if steps == 0:
            return {}
        values = dict(zip(SUMS, total.tolist(), strict=True))
        rows = max(values.pop("rows"), 1.0)
        # the two terms carry weights that are divided per step and multiplied by the number of ranks
        terms = {name: values.pop(name) / (steps * self.world_size) for name in ("kl", "completion")}
        return {"loss": sum(terms.values()), **terms, **{name: value / rows for name, value in values.items()}}

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on between two logs; to be called by every rank."""
        totals = [self.total]
        if self.world_size > 1:
            totals = [self._zeros() for _ in range(self.world_size)]
            dist.all_gather(totals, self.total)
        return {"steps": self.steps, "totals": [total.tolist() for total in totals]}

    def restore(self, state: dict[str, Any], rank: int) -> None:
        """Go on from what `state` returned, on the same number of ranks."""
        self.steps = state["steps"]
        self.total = torch.tensor(state["totals"][rank], dtype=torch.float64, device=self.device)


class DriftWarning:
    """Says when the student's mean logit has left the aligned model's, once each time the distance grows by as much.

    The penalty as printed is not invariant to a shift of all logits: a student trained long enough can escape it by
    lowering every logit (docs/microworld.md).
    """

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self.said = 0.0

    def message(self, metrics: dict[str, float]) -> str | None:
        """A warning about a log's metrics, None where there is none to give."""
        if self.threshold is None or "mean_logit" not in metrics:
            return None
        drift = metrics["mean_logit"] - metrics["aligned_mean_logit"]
        if abs(drift) <= self.said + self.threshold:
            return None
        self.said = abs(drift) // self.threshold * self.threshold
        return (
            f"the student's mean logit is {metrics['mean_logit']:.2f}, {drift:+.2f} from the aligned model's on the "
            "same tokens: it may be escaping the penalty by a shift of all logits. Consider loss.penalty: "
            "centered_square, or fewer steps"
        )


class Speed(TrainerCallback):
    """Seconds per optimizer step and tokens per second of this call, and the peak memory of this rank."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.started = 0.0

    def saw(self, batch: Batch) -> None:
        """Count a micro-batch's tokens, padding left out. Called before the batch leaves the CPU."""
        mask = batch.get("attention_mask")
        self.tokens[-1] += int(batch["input_ids"].numel() if mask is None else mask.sum())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.tokens.append(0)
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock. Logging every step, as is the default, has the device synchronised by then."""
        self.seconds.append(time.perf_counter() - self.started)

    def summary(self, warm_up: int = 2) -> dict[str, float]:
        """Median step and mean rate without the first few steps; tokens of all ranks; empty if no step was taken."""
        seconds, tokens = self.seconds[warm_up:] or self.seconds, self.tokens[warm_up:] or self.tokens
        if not seconds:
            return {}
        step_seconds = sorted(seconds)[len(seconds) // 2]
        per_second = sum(tokens) * self.world_size / sum(seconds)
        return {"step_seconds": step_seconds, "tokens_per_second": per_second, "peak_memory_mib": peak_memory_mib()}


def peak_memory_mib() -> float:
    """Largest memory of this process so far: the GPU's if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

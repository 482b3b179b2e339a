"""The student's forward in training: the completion loss inside the engine's forward.

Under ZeRO-3 a parameter exists only while the module that owns it runs, so the loss, which multiplies hidden states
with the head, has to be part of the wrapped model's forward. `attach_completion_loss` puts it there: the student's own
forward is replaced, on that one instance, by one that returns the loss and its statistics.

Two forms. "linear" goes from hidden states and heads to the loss and never holds logits. "logits" runs the models' own
heads and holds the logits of the weighted rows of all three: for comparison, and for families whose head
`deepalign/output_head.py` does not know.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepalign.data.steps import Batch
from deepalign.kernels.completion_loss import (
    CompletionLossConfig,
    CompletionLossOutput,
    fused_completion_loss,
    fused_linear_completion_loss,
)
from deepalign.output_head import OutputHead, hidden_states, output_head
from deepalign.train.teachers import Teachers, model_inputs, rows_of

LossForm = Literal["linear", "logits"]

# What the forward sums over a batch's rows, in this order.
SUMS = ("kl", "completion", "alpha", "base_favored_count", "mean_logit", "aligned_mean_logit", "rows")
# What of a batch the loss is told about each row, beside hidden states or logits.
ROW_OPTIONS = ("kl_weight", "completion_weight", "top_k_indices")
_MEAN_CHUNK = 16384  # vocabulary entries averaged at a time: no float32 copy of a whole head


def attach_completion_loss(
    model: PreTrainedModel,
    teachers: Teachers,
    *,
    config: CompletionLossConfig,
    vocab_size: int,
    form: LossForm = "linear",
    implementation: str | None = None,
) -> Callable[[], None]:
    """Replace `model.forward`, on this instance, by one that returns the completion loss.

    The new forward takes a `StepDataset` batch and returns {"loss": scalar, "sums": (7,) float64 statistics summed over
    the batch's R rows, see `SUMS`, "bad_rows": (R,) bool, rows whose loss is not finite}.

    `mean_logit` is the mean over the vocabulary of scale h W^T, in the linear form before a softcap (h times the mean
    of W's rows: no logits are needed), in the logits form of the logits as they are, after it.

    Args:
        model: the student, also one wrapped by peft.
        teachers: the frozen teachers.
        config, implementation: as for `fused_completion_loss`.
        vocab_size: number of real vocabulary entries; padding entries beyond are ignored.
        form: "linear" or "logits".

    Returns:
        A function that gives the model its own forward back.
    """
    model_forward = model.forward
    settings = {"config": config, "vocab_size": vocab_size, "reduction": "sum", "implementation": implementation}

    def completion_forward(**batch: Tensor) -> dict[str, Tensor]:
        options = settings | {name: batch.get(name) for name in ROW_OPTIONS}
        # teachers first: what they need is free again before the student's activations are kept
        if form == "linear":
            output, means = _linear(model, teachers, batch, options)
        else:
            output, means = _logits(model_forward, teachers, batch, options)
        return _statistics(output, means, batch)

    model.forward = completion_forward

    def restore() -> None:
        model.forward = model_forward

    return restore


Means = tuple[Tensor, Tensor]  # mean logit of student and aligned model per row, (R,) each


def _linear(
    model: PreTrainedModel, teachers: Teachers, batch: Batch, options: dict[str, Any]
) -> tuple[CompletionLossOutput, Means]:
    aligned_RH, base_RH = teachers.hidden(batch)
    student_RH = rows_of(hidden_states(model, **model_inputs(batch)), batch["row_index"])
    student, aligned, base = output_head(model), teachers.aligned_head, teachers.base_head
    output = fused_linear_completion_loss(
        student_RH,
        student.lm_head,
        aligned_RH,
        aligned.lm_head,
        base_RH,
        base.lm_head,
        logit_softcap=student.logit_softcap,
        logit_scale=student.logit_scale,
        **options,
    )
    size = options["vocab_size"]
    return output, (mean_logit(student_RH, student, size), mean_logit(aligned_RH, aligned, size))


def _logits(
    model_forward: Callable[..., object], teachers: Teachers, batch: Batch, options: dict[str, Any]
) -> tuple[CompletionLossOutput, Means]:
    aligned_RV, base_RV = teachers.logits(batch)
    logits_BTV: Tensor = model_forward(**model_inputs(batch), use_cache=False).logits  # type: ignore[attr-defined]
    student_RV = rows_of(logits_BTV, batch["row_index"])
    width = min(logits.shape[-1] for logits in (student_RV, aligned_RV, base_RV))
    dtype = torch.promote_types(student_RV.dtype, aligned_RV.dtype)
    student_RV, aligned_RV, base_RV = (logits[:, :width].to(dtype) for logits in (student_RV, aligned_RV, base_RV))
    output = fused_completion_loss(student_RV, aligned_RV, base_RV, **options)
    student_R, aligned_R = (
        logits.detach()[:, : options["vocab_size"]].mean(dim=-1, dtype=torch.float32)
        for logits in (student_RV, aligned_RV)
    )
    return output, (student_R, aligned_R)


@torch.no_grad()
def mean_logit(hidden_RH: Tensor, head: OutputHead, vocab_size: int) -> Tensor:
    """Mean over the vocabulary of scale h W^T, before any softcap: scale h times the mean of W's rows; (R,) float32."""
    sums = [rows.sum(dim=0, dtype=torch.float32) for rows in head.lm_head[:vocab_size].split(_MEAN_CHUNK)]
    mean_H = torch.stack(sums).sum(dim=0) / vocab_size
    with torch.autocast(hidden_RH.device.type, enabled=False):
        return head.logit_scale * (hidden_RH.float() @ mean_H)


@torch.no_grad()
def _statistics(output: CompletionLossOutput, means: Means, batch: Batch) -> dict[str, Tensor]:
    kl_R = batch["kl_weight"] * output.kl
    completion_R = batch["completion_weight"] * output.alpha * output.completion
    sums = (
        kl_R.sum(),
        completion_R.sum(),
        output.alpha.sum(),
        output.base_favored_count.sum(),
        means[0].sum(),
        means[1].sum(),
        torch.full((), kl_R.numel(), device=kl_R.device),
    )
    return {
        "loss": output.loss,
        "sums": torch.stack([value.to(torch.float64) for value in sums]),
        "bad_rows": ~torch.isfinite(kl_R + completion_R),
    }

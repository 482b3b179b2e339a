"""The public completion loss from hidden states: no logits beyond a chunk of rows. `linear_op.py` computes."""

import torch
from torch import Tensor

from deepalign.kernels.checks import compute_dtype, implementation_name, storable
from deepalign.kernels.completion_loss import linear_op  # noqa: F401  (defines the ops)
from deepalign.kernels.completion_loss.api import (
    IMPLEMENTATIONS,
    PAPER_CONFIG,
    Reduction,
    check_selection,
    check_settings,
    row_weights,
)
from deepalign.kernels.completion_loss.config import CompletionLossConfig, CompletionLossOutput
from deepalign.kernels.library import index_rows
from deepalign.kernels.linear_rows import check_logit_options, check_models, choose_chunk_rows, under_autocast
from deepalign.kernels.upstream import check_no_tangent


def fused_linear_completion_loss(
    student_hidden: Tensor,
    student_lm_head: Tensor,
    aligned_hidden: Tensor,
    aligned_lm_head: Tensor,
    base_hidden: Tensor,
    base_lm_head: Tensor,
    *,
    kl_weight: Tensor | None = None,
    completion_weight: Tensor | None = None,
    top_k_indices: Tensor | None = None,
    config: CompletionLossConfig = PAPER_CONFIG,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
    recompute: bool = False,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    implementation: str | None = None,
) -> CompletionLossOutput:
    """`fused_completion_loss` of logits softcap tanh(scale h W^T / softcap), of which only a chunk of rows exists.

    Logits are float32 and never rounded to the dtype of the hidden states. The gradients of the student's hidden states
    and head are computed along with the loss: 5 products of the size of h W^T, 4 where the head needs none. Memory and
    equations: docs/linear-loss.md.

    Args:
        student_hidden, student_lm_head: (..., H) and (V, H) of one dtype, bf16, fp16, fp32 or fp64; what needs a
            gradient gets one. A head tied to the embedding is passed as it is: autograd adds the two gradients.
        aligned_hidden, aligned_lm_head, base_hidden, base_lm_head: of the frozen models, each with an H and a dtype of
            its own; the same rows and device. No gradient flows to them.
        kl_weight, completion_weight: (...,) as for `fused_completion_loss`. Rows whose two weights are 0 are dropped
            before any product; to find them costs a GPU one synchronisation, none where one of the weights is None.
        top_k_indices, config, reduction: as for `fused_completion_loss`.
        vocab_size: only the first `vocab_size` rows of the heads exist; with it, V may differ between the models.
        chunk_rows: rows of logits held at a time; None chooses by memory and efficiency. The result does not depend on
            it beyond rounding.
        recompute: compute no gradient in the forward, keep the hidden states instead and start again in the backward (3
            products more). Without it the gradients are kept: of the hidden states, and of the head. `reduction="none"`
            with a head that needs a gradient recomputes in any case: each row's upstream gradient belongs in the sum
            over rows that the head's gradient is.
        logit_softcap, logit_scale: of all three models; None and 1 for models without.
        implementation: of the row kernel: "reference", "cpu", "triton", or None to choose by device.

    Under `torch.autocast` hidden states and heads are cast as for a linear layer. Biases of heads are not supported,
    nor is a head split over devices. `lm_head.weight` knows nothing of a LoRA adapter on the head: `lm_head_weight`
    does.

    Returns:
        `CompletionLossOutput`, float32 (float64 for float64). A row with NaN or infinite logits has a NaN loss and a
        NaN gradient of its hidden state; the head's gradient, a sum over rows, is then NaN too.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a value, shape or device that does not fit; a sharded (DTensor) or partitioned (ZeRO-3) head.
        RuntimeError: the implementation cannot run.
    """
    check_settings(config, reduction, recompute=recompute)
    check_logit_options(logit_softcap, logit_scale, chunk_rows)
    given = (student_hidden, student_lm_head, aligned_hidden, aligned_lm_head, base_hidden, base_lm_head)
    student, student_head, aligned, aligned_head, base, base_head = map(under_autocast, given)
    models = {"student": (student, student_head), "aligned": (aligned, aligned_head), "base": (base, base_head)}
    vocab_size = check_models(vocab_size, models)
    check_selection(config, top_k_indices, student, vocab_size)
    kl_weight_N, completion_weight_N = row_weights(kl_weight, completion_weight, student, reduction)
    serving = implementation_name(IMPLEMENTATIONS, implementation, student.device, compute_dtype(student))
    for name, tensor in (("student_hidden", student), ("student_lm_head", student_head)):
        check_no_tangent(name, tensor)
    dhidden, dlm_head = _gradients_in_forward(student, student_head, reduction, recompute)
    if not (dhidden or dlm_head):  # kept for the backward, which torch refuses for tensors of inference mode
        student, aligned, base = map(storable, (student, aligned, base))
        student_head, aligned_head, base_head = (
            storable(head, copy=False) for head in (student_head, aligned_head, base_head)
        )
        top_k_indices = None if top_k_indices is None else storable(top_k_indices)
    if chunk_rows is None:
        chunk_rows = _chosen_chunk_rows(student, student_head, vocab_size, logit_softcap is not None, dhidden)
    output = torch.ops.deepalign.linear_completion_loss(
        student.reshape(-1, student.shape[-1]),
        student_head,
        *(tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in (aligned, aligned_head, base, base_head)),
        kl_weight_N.reshape(-1),
        completion_weight_N.reshape(-1),
        None if top_k_indices is None else index_rows(top_k_indices),
        kl_weight is not None and completion_weight is not None,
        config.top_k,
        config.teacher_mix,
        config.temperature,
        config.alpha_base,
        config.gamma,
        config.lambda_reg,
        config.kl_direction,
        config.favored_from,
        config.penalty,
        vocab_size,
        chunk_rows,
        logit_softcap,
        logit_scale,
        serving,
        reduction != "none",
        dhidden,
        dlm_head,
    )
    return _shaped(output, student.shape[:-1], reduction)


def _gradients_in_forward(student: Tensor, head: Tensor, reduction: str, recompute: bool) -> tuple[bool, bool]:
    """Which of dh and dW the forward computes: those needed, none where the backward starts again."""
    dhidden, dlm_head = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (student, head))
    if recompute or (dlm_head and reduction == "none"):
        return False, False
    return dhidden, dlm_head


def _chosen_chunk_rows(student: Tensor, head: Tensor, vocab_size: int, softcap: bool, dhidden: bool) -> int:
    on_gpu = student.device.type != "cpu"
    buffers = chunk_buffers(softcap, on_gpu)
    head_bytes = 2 * head.numel() if on_gpu and dhidden and head.dtype == torch.bfloat16 else 0
    return choose_chunk_rows(student.shape[:-1].numel(), vocab_size, student.device, buffers, head_bytes)


def chunk_buffers(softcap: bool, on_gpu: bool) -> float:
    """float32 entries that the loss holds per entry of a chunk's logits."""
    return 3.0 + softcap + (0.5 if on_gpu else 0.0)


def _shaped(output: tuple[Tensor, ...], rows: torch.Size, reduction: str) -> CompletionLossOutput:
    loss, kl, completion, alpha, count, indices = output[:6]
    return CompletionLossOutput(
        loss.view(rows) if reduction == "none" else loss,
        *(kl.view(rows), completion.view(rows), alpha.view(rows), count.view(rows)),
        indices.view(*rows, indices.shape[-1]),
    )

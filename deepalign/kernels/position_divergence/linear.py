"""Position statistics from hidden states: no logits beyond a chunk of rows. `linear_rows.py` has the parts."""

from typing import Any

import torch
from torch import Tensor

from deepalign.kernels.checks import check_top, compute_dtype, implementation_name
from deepalign.kernels.library import LIBRARY
from deepalign.kernels.linear_rows import (
    Head,
    check_logit_options,
    check_models,
    choose_chunk_rows,
    logits_,
    under_autocast,
)
from deepalign.kernels.position_divergence.api import IMPLEMENTATIONS, Implementation
from deepalign.kernels.position_divergence.reference import PositionDivergence

LIBRARY.define(
    "linear_position_divergence(Tensor aligned_hidden, Tensor aligned_lm_head, Tensor base_hidden, "
    "Tensor base_lm_head, int top_n, SymInt vocab_size, SymInt chunk_rows, float? logit_softcap, float logit_scale, "
    "str implementation) -> "
    "(Tensor kl, Tensor reverse_kl, Tensor jsd, Tensor top_overlap, Tensor favored_count, Tensor favored_in_top)"
)


def linear_position_divergence(
    aligned_hidden: Tensor,
    aligned_lm_head: Tensor,
    base_hidden: Tensor,
    base_lm_head: Tensor,
    *,
    top_n: int = 100,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    implementation: str | None = None,
) -> PositionDivergence:
    """`position_divergence` of logits softcap tanh(scale h W^T / softcap), of which only a chunk of rows exists.

    Carries no gradient. Logits are float32 and never rounded to the dtype of the hidden states.

    Args:
        aligned_hidden, aligned_lm_head, base_hidden, base_lm_head: (..., H) and (V, H) per model, each with an H and a
            dtype (bf16, fp16, fp32 or fp64) of its own; the same rows and device.
        top_n: how many largest logits count as a model's top.
        vocab_size: only the first `vocab_size` rows of the heads exist; with it, V may differ between the models.
        chunk_rows: rows of logits held at a time; None chooses by memory and efficiency.
        logit_softcap, logit_scale: of both models; None and 1 for models without.
        implementation: of the row kernel: "reference", "cpu", "triton", or None to choose by device.

    Returns:
        `PositionDivergence`, (...,) each.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a value, shape or device that does not fit; a sharded (DTensor) or partitioned (ZeRO-3) head.
        RuntimeError: the implementation cannot run.
    """
    check_logit_options(logit_softcap, logit_scale, chunk_rows)
    given = (aligned_hidden, aligned_lm_head, base_hidden, base_lm_head)
    aligned, aligned_head, base, base_head = map(under_autocast, given)
    vocab_size = check_models(vocab_size, {"aligned": (aligned, aligned_head), "base": (base, base_head)})
    check_top("top_n", top_n, vocab_size)
    serving = implementation_name(IMPLEMENTATIONS, implementation, aligned.device, compute_dtype(aligned))
    rows = aligned.shape[:-1]
    if chunk_rows is None:
        chunk_rows = choose_chunk_rows(rows.numel(), vocab_size, aligned.device, buffers=2.0)
    statistics = torch.ops.deepalign.linear_position_divergence(
        *(tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in (aligned, aligned_head, base, base_head)),
        top_n,
        vocab_size,
        chunk_rows,
        logit_softcap,
        logit_scale,
        serving,
    )
    return PositionDivergence(*(statistic.view(rows) for statistic in statistics))


@torch.no_grad()
def _chunks(
    aligned_NH: Tensor,
    aligned_lm_head: Tensor,
    base_NH: Tensor,
    base_lm_head: Tensor,
    top_n: int,
    vocab_size: int,
    chunk_rows: int,
    softcap: float | None,
    scale: float,
    name: str,
) -> tuple[Tensor, ...]:
    implementation, device = IMPLEMENTATIONS[name], aligned_NH.device
    assert isinstance(implementation, Implementation)
    statistics = _empty(aligned_NH)
    dtype, rows = statistics[0].dtype, aligned_NH.shape[0]
    buffers = [torch.empty(min(chunk_rows, rows), vocab_size, dtype=dtype, device=device) for _ in range(2)]
    with torch.autocast(device.type, enabled=False):
        for first in range(0, rows, chunk_rows):
            chunk = slice(first, min(first + chunk_rows, rows))
            logits = [buffer[: chunk.stop - first] for buffer in buffers]
            for out_RV, hidden_NH, lm_head in zip(
                logits, (aligned_NH, base_NH), (aligned_lm_head, base_lm_head), strict=True
            ):
                logits_(Head(hidden_NH[chunk], lm_head[:vocab_size]), scale, softcap, out_RV)
            found = implementation.position_divergence(logits[0], logits[1], top_n, vocab_size)
            for target, values in zip(statistics, found, strict=True):
                target[chunk] = values
    return statistics


def _empty(aligned_hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = compute_dtype(aligned_hidden)
    rows = aligned_hidden.shape[0]
    return tuple(aligned_hidden.new_empty(rows, dtype=kind) for kind in [dtype] * 4 + [torch.int64] * 2)


LIBRARY.impl("linear_position_divergence", _chunks, "CompositeExplicitAutograd")
torch.library.register_fake("deepalign::linear_position_divergence", _empty, lib=LIBRARY)

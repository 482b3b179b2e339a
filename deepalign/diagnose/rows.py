"""Everything that is measured at a row: one position of one response, two models' predictions of its token.

From hidden states and heads, a chunk of rows of logits at a time, each logit computed once:

    hidden states -> logits in float32 -> [Eq. 7, contrastive only] -> the position statistics
                                                                    -> the most base-favored tokens (Alg. 1)
                                                                    -> base-favored among base's top n

`linear_position_divergence` gives the first of the three alone. Here the product with the head, which is most of the
time, is shared by all three (docs/log.md), and the kernels read a few rows at a time, so that the second and third find
them in cache.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepalign.kernels.checks import check_int, compute_dtype
from deepalign.kernels.contrastive_sample import Space, contrastive_logits, contrastive_sample
from deepalign.kernels.linear_rows import Head, check_models, choose_chunk_rows, logits_, under_autocast
from deepalign.kernels.position_divergence import base_favored_tokens, position_divergence
from deepalign.output_head import OutputHead

# What is known of a row, in the order of the records; all in nats, in [0, 1], or counts of vocabulary entries.
STATISTICS = (
    "kl",
    "reverse_kl",
    "jsd",
    "top_overlap",
    "favored_count",
    "favored_in_top",
    "favored_in_base_top",
)
CPU_BLOCK_ELEMENTS = 1 << 20  # logits of both models that the kernels read before the next rows: 8 MiB, a share of L3


class RowStatistics(NamedTuple):
    """`STATISTICS` by name, (N,) each, and the base-favored tokens (N, top_k) int64, descending, -1 for none."""

    kl: Tensor
    reverse_kl: Tensor
    jsd: Tensor
    top_overlap: Tensor
    favored_count: Tensor
    favored_in_top: Tensor
    favored_in_base_top: Tensor
    favored_tokens: Tensor


class ModelRows(NamedTuple):
    """One model at N rows: its hidden states (N, H) and its head."""

    hidden_NH: Tensor
    head: OutputHead


@dataclass(frozen=True)
class RowOptions:
    """What is measured, and how.

    Attributes:
        top_n: size of a model's top, for top_overlap, favored_in_top and favored_in_base_top; at most the vocabulary.
        top_k: how many base-favored tokens are kept (Alg. 1's k); 0 for none.
        contrast: (alpha, space): the aligned model's logits are replaced by Eq. 7's before anything is measured.
        vocab_size: leading entries that exist; None for all that both heads have.
        chunk_rows: rows of logits held at a time; None chooses.
        implementation: of the row kernels; None chooses by device.
    """

    top_n: int = 100
    top_k: int = 100
    contrast: tuple[float, Space] | None = None
    vocab_size: int | None = None
    chunk_rows: int | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("top_n", self.top_n, 1), ("top_k", self.top_k, 0)):
            check_int(name, value)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


@torch.no_grad()
def measure_rows(aligned: ModelRows, base: ModelRows, options: RowOptions) -> RowStatistics:
    """Compare two models at N rows.

    Args:
        aligned, base: the same rows, each with its own hidden size, softcap and scale; moved to aligned's device.
        options: what is measured.

    Returns:
        `RowStatistics` on aligned's device. A row with NaN or infinite logits has statistics NaN, counts 0, tokens -1.

    Raises:
        TypeError, ValueError: hidden states, heads or options that do not fit (as `linear_position_divergence`).
    """
    device = aligned.hidden_NH.device
    pairs = [_prepared(rows, device) for rows in (aligned, base)]
    vocab_size = options.vocab_size or min(lm_head.shape[0] for _, lm_head in pairs)
    check_models(vocab_size, {"aligned": pairs[0], "base": pairs[1]})
    rows, dtype = aligned.hidden_NH.shape[0], compute_dtype(pairs[0][0])
    buffers = 2.0 if options.contrast is None else 8.0  # eager Eq. 7 holds several copies
    chunk_rows = options.chunk_rows or choose_chunk_rows(rows, vocab_size, device, buffers=buffers)
    block_rows = _block_rows(vocab_size, chunk_rows, device)
    logits = [torch.empty(min(chunk_rows, rows), vocab_size, dtype=dtype, device=device) for _ in pairs]
    found = []
    for first in range(0, rows, chunk_rows):
        last = min(first + chunk_rows, rows)
        chunk = [buffer[: last - first] for buffer in logits]
        for out_RV, (hidden_NH, lm_head), model in zip(chunk, pairs, (aligned, base), strict=True):
            head = Head(hidden_NH[first:last], lm_head[:vocab_size])
            with torch.autocast(device.type, enabled=False):
                logits_(head, model.head.logit_scale, model.head.logit_softcap, out_RV)
        for blocks in zip(*(out_RV.split(block_rows) for out_RV in chunk), strict=True):
            found.append(_measure_logits(blocks[0], blocks[1], options))
    if not found:
        return _measure_logits(logits[0], logits[1], options)
    return RowStatistics(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _prepared(rows: ModelRows, device: torch.device) -> tuple[Tensor, Tensor]:
    hidden, lm_head = (under_autocast(tensor).detach().to(device) for tensor in (rows.hidden_NH, rows.head.lm_head))
    return hidden, lm_head


def _block_rows(vocab_size: int, chunk_rows: int, device: torch.device) -> int:
    """Rows that the kernels read at a time: all of a chunk on a GPU, a few that stay in cache on a CPU."""
    if device.type != "cpu":
        return chunk_rows
    least = 2 * torch.get_num_threads()  # kernels deal rows to threads
    return max(1, min(chunk_rows, max(least, CPU_BLOCK_ELEMENTS // vocab_size)))


def _measure_logits(aligned_RV: Tensor, base_RV: Tensor, options: RowOptions) -> RowStatistics:
    vocab_size = aligned_RV.shape[-1]
    if options.contrast is not None:
        alpha, space = options.contrast
        aligned_RV = contrastive_logits(aligned_RV, base_RV, alpha=alpha, space=space)
    common: dict[str, Any] = {"implementation": options.implementation}
    top_n = min(options.top_n, vocab_size)
    divergence = position_divergence(aligned_RV, base_RV, top_n=top_n, **common)
    if options.top_k:
        tokens = base_favored_tokens(aligned_RV, base_RV, top_k=min(options.top_k, vocab_size), **common).indices
    else:
        tokens = torch.empty(len(aligned_RV), 0, dtype=torch.int64, device=aligned_RV.device)
    in_base_top = favored_in_base_top(aligned_RV, base_RV, top_n, options.implementation)
    return RowStatistics(*divergence, torch.where(divergence.kl.isnan(), 0, in_base_top), tokens)


def favored_in_base_top(aligned_RV: Tensor, base_RV: Tensor, top_n: int, implementation: str | None = None) -> Tensor:
    """Base-favored entries among the base model's top n, (R,) int64.

    Base's top n are the n largest differences from logits that are all 0, which the selection kernel finds without a
    sort, ties to the lowest index. An entry v of them is base-favored where b_v - a_v > lse(b) - lse(a).
    """
    zeros_RV = aligned_RV.new_zeros(1, aligned_RV.shape[-1]).expand_as(base_RV)
    top_RK = base_favored_tokens(zeros_RV, base_RV, top_k=top_n, implementation=implementation).indices
    there_RK = top_RK >= 0
    index_RK = top_RK.clamp(min=0)
    difference_RK = base_RV.gather(-1, index_RK) - aligned_RV.gather(-1, index_RK)
    (token_b_R1, log_b_R1), (token_a_R1, log_a_R1) = (
        _drawn(logits_RV, implementation) for logits_RV in (base_RV, aligned_RV)
    )
    # Two differences, as the kernels take them: exactly the shift where the models differ by one.
    threshold_R1 = (base_RV.gather(-1, token_b_R1) - aligned_RV.gather(-1, token_a_R1)) + (log_a_R1 - log_b_R1)
    return ((difference_RK > threshold_R1) & there_RK).sum(-1)


def _drawn(logits_RV: Tensor, implementation: str | None) -> tuple[Tensor, Tensor]:
    """A token (R, 1) and its log-probability (R, 1): lse is the token's logit minus it.

    The sampler reads the logits once, in cache; `torch.logsumexp` takes twenty times as long.
    """
    half_R = logits_RV.new_full((len(logits_RV),), 0.5, dtype=torch.float64)
    drawn = contrastive_sample(logits_RV, logits_RV, alpha=0.0, uniforms=half_R, implementation=implementation)
    return drawn.token_ids.clamp(min=0)[:, None], drawn.logprobs[:, None]

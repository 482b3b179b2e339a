"""Everything that is measured at a row: one position of one response, two models' predictions of its token.

From hidden states and heads, a chunk of rows of logits at a time, each logit computed once:

    hidden states -> logits in float32 -> [Eq. 7, contrastive only] -> `position_statistics`

`linear_position_divergence` gives a part of them. Here the product with the head, which is most of the time, is shared
by all of them (docs/log.md), and the kernels read a few rows at a time, which stay in cache.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepalign.kernels.checks import check_int, compute_dtype
from deepalign.kernels.contrastive_sample import Space, contrastive_logits
from deepalign.kernels.linear_rows import Head, check_models, choose_chunk_rows, logits_, under_autocast
from deepalign.kernels.position_divergence import PositionStatistics, position_statistics
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


RowStatistics = PositionStatistics  # `STATISTICS` by name, (N,) each, and `favored_tokens` (N, top_k)


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
    found = position_statistics(
        aligned_RV,
        base_RV,
        top_n=min(options.top_n, vocab_size),
        top_k=min(max(options.top_k, 1), vocab_size),
        implementation=options.implementation,
    )
    return found._replace(favored_tokens=found.favored_tokens[:, : options.top_k])

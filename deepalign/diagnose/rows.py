"""Everything that is measured at a row: one position of one response, two models' predictions of its token.

`linear_position_statistics` makes a chunk of rows of logits from hidden states and heads, each logit once, and measures
all of it. Here are the options of a diagnosis, and models as they are loaded.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from deepalign.kernels.checks import check_int
from deepalign.kernels.contrastive_sample import Space
from deepalign.kernels.position_divergence import PositionStatistics, linear_position_statistics
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
    device, heads = aligned.hidden_NH.device, (aligned.head, base.head)
    vocab_size = options.vocab_size or min(head.lm_head.shape[0] for head in heads)
    return linear_position_statistics(
        *(matrix.to(device) for rows in (aligned, base) for matrix in (rows.hidden_NH, rows.head.lm_head)),
        top_n=min(options.top_n, vocab_size),
        top_k=min(options.top_k, vocab_size),
        vocab_size=vocab_size,
        chunk_rows=options.chunk_rows,
        logit_softcaps=(heads[0].logit_softcap, heads[1].logit_softcap),
        logit_scales=(heads[0].logit_scale, heads[1].logit_scale),
        contrast=options.contrast,
        implementation=options.implementation,
    )

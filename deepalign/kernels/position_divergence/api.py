"""The public position statistics: validate, choose an implementation."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from deepalign.kernels.checks import check_logits, check_top, choose_implementation
from deepalign.kernels.library import WHY_NO_NATIVE, WHY_NO_TRITON
from deepalign.kernels.position_divergence import cpu
from deepalign.kernels.position_divergence.reference import (
    BaseFavoredTokens,
    PositionDivergence,
    base_favored_tokens_rows,
    position_divergence_rows,
)


class Implementation(NamedTuple):
    """What a file beside this one provides; both take (aligned_NV, base_NV, how many largest, vocab_size)."""

    position_divergence: Callable[[Tensor, Tensor, int, int], PositionDivergence]
    base_favored_tokens: Callable[[Tensor, Tensor, int, int], BaseFavoredTokens]


# By name: an implementation, or why it cannot run.
IMPLEMENTATIONS: dict[str, Implementation | str] = {
    "reference": Implementation(position_divergence_rows, base_favored_tokens_rows),
    "cpu": WHY_NO_NATIVE or Implementation(cpu.position_divergence_rows, cpu.base_favored_tokens_rows),
    # The same functions: the ops they call have a kernel per device.
    "triton": WHY_NO_TRITON or Implementation(cpu.position_divergence_rows, cpu.base_favored_tokens_rows),
}


def position_divergence(
    aligned_logits: Tensor,
    base_logits: Tensor,
    *,
    top_n: int = 100,
    vocab_size: int | None = None,
    implementation: str | None = None,
) -> PositionDivergence:
    """How far two models are apart at each position, at temperature 1, in nats. Carries no gradient.

    Args:
        aligned_logits, base_logits: (..., V) bf16, fp16, fp32 or fp64; same shape, dtype and device.
        top_n: how many largest logits count as a model's top. Where fewer entries are present, it is those.
        vocab_size: only the first `vocab_size` entries exist; None for all V.
        implementation: "reference", "cpu", "triton", or None to choose by device.

    Returns:
        `PositionDivergence`: kl = KL(aligned‖base), reverse_kl, jsd in [0, log 2] up to rounding, top_overlap in
        [0, 1], favored_count over the vocabulary and favored_in_top among aligned's top n. A row with NaN, +inf, or
        -inf in one model only has statistics NaN and counts 0; an entry that is -inf in both is absent, like padding.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a value, shape or device that does not fit.
        RuntimeError: the implementation cannot run.
    """
    vocab_size = check_logits(vocab_size, aligned_logits=aligned_logits, base_logits=base_logits)
    check_top("top_n", top_n, vocab_size)
    chosen = choose_implementation(IMPLEMENTATIONS, implementation, aligned_logits.device, aligned_logits.dtype)
    return chosen.position_divergence(aligned_logits, base_logits, top_n, vocab_size)


def base_favored_tokens(
    aligned_logits: Tensor,
    base_logits: Tensor,
    *,
    top_k: int = 100,
    vocab_size: int | None = None,
    implementation: str | None = None,
) -> BaseFavoredTokens:
    """The tokens that the base model raises most over the aligned one (Alg. 1, Def. 3), and how many it favors (Eq. 6).

    Carries no gradient.

    Args:
        aligned_logits, base_logits: (..., V) bf16, fp16, fp32 or fp64; same shape, dtype and device.
        top_k: how many entries, 1 <= top_k <= vocab_size.
        vocab_size: only the first `vocab_size` entries exist; None for all V.
        implementation: "reference", "cpu", "triton", or None to choose by device.

    Returns:
        `BaseFavoredTokens`, descending, ties to the lowest index. Where fewer than `top_k` entries are present: index
        -1, difference -inf. Bad rows (as in `position_divergence`): indices -1, differences NaN, count 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a value, shape or device that does not fit.
        RuntimeError: the implementation cannot run.
    """
    vocab_size = check_logits(vocab_size, aligned_logits=aligned_logits, base_logits=base_logits)
    check_top("top_k", top_k, vocab_size)
    chosen = choose_implementation(IMPLEMENTATIONS, implementation, aligned_logits.device, aligned_logits.dtype)
    return chosen.base_favored_tokens(aligned_logits, base_logits, top_k, vocab_size)

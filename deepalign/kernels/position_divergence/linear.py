"""Position statistics from hidden states: no logits beyond a chunk of rows. `linear_rows.py` has the parts.

Both ops here go through the rows in the same way:

    a chunk of hidden states -> logits of both models, float32 -> a few rows at a time -> the kernels of the statistics

The head is read once per chunk, so chunks are large; the kernels read the logits twice, so on a CPU they get only so
many rows at a time as stay in cache between the two.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from deepalign.kernels.checks import (
    check_choice,
    check_int,
    check_number,
    check_top,
    compute_dtype,
    implementation_name,
)
from deepalign.kernels.contrastive_sample import Space, contrastive_logits
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
from deepalign.kernels.position_divergence.statistics import PositionStatistics, position_statistics

CPU_BLOCK_ELEMENTS = 1 << 20  # logits of a model that the kernels read before the next rows: 4 MiB, a share of L3

LIBRARY.define(
    "linear_position_divergence(Tensor aligned_hidden, Tensor aligned_lm_head, Tensor base_hidden, "
    "Tensor base_lm_head, int top_n, SymInt vocab_size, SymInt chunk_rows, float? logit_softcap, float logit_scale, "
    "str implementation) -> "
    "(Tensor kl, Tensor reverse_kl, Tensor jsd, Tensor top_overlap, Tensor favored_count, Tensor favored_in_top)"
)
LIBRARY.define(
    "linear_position_statistics(Tensor aligned_hidden, Tensor aligned_lm_head, Tensor base_hidden, "
    "Tensor base_lm_head, int top_n, int top_k, SymInt vocab_size, SymInt chunk_rows, float? aligned_softcap, "
    "float aligned_scale, float? base_softcap, float base_scale, float? alpha, str space, str implementation) -> "
    "(Tensor kl, Tensor reverse_kl, Tensor jsd, Tensor top_overlap, Tensor favored_count, Tensor favored_in_top, "
    "Tensor favored_in_base_top, Tensor favored_tokens)"
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
    call = _check_call((aligned_hidden, aligned_lm_head, base_hidden, base_lm_head), vocab_size, top_n, implementation)
    statistics = torch.ops.deepalign.linear_position_divergence(
        *call.matrices,
        top_n,
        call.vocab_size,
        chunk_rows or call.chunk_rows(buffers=2.0),
        logit_softcap,
        logit_scale,
        call.serving,
    )
    return PositionDivergence(*(statistic.view(call.rows) for statistic in statistics))


def linear_position_statistics(
    aligned_hidden: Tensor,
    aligned_lm_head: Tensor,
    base_hidden: Tensor,
    base_lm_head: Tensor,
    *,
    top_n: int = 100,
    top_k: int = 100,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    logit_softcaps: tuple[float | None, float | None] = (None, None),
    logit_scales: tuple[float, float] = (1.0, 1.0),
    contrast: tuple[float, Space] | None = None,
    implementation: str | None = None,
) -> PositionStatistics:
    """`position_statistics` of logits of which only a chunk of rows exists; as `linear_position_divergence`, and more.

    Args:
        aligned_hidden, aligned_lm_head, base_hidden, base_lm_head, top_n, vocab_size, chunk_rows, implementation: as of
            `linear_position_divergence`.
        top_k: how many base-favored tokens, 0 for none.
        logit_softcaps, logit_scales: of the aligned model and of the base model.
        contrast: (alpha, space): Eq. 7's logits take the place of the aligned model's before anything is measured.

    Returns:
        `PositionStatistics`, (...,) each and (..., top_k). A row with NaN or infinite logits has statistics NaN,
        counts 0, tokens -1.

    Raises:
        TypeError, ValueError, RuntimeError: as of `linear_position_divergence`.
    """
    _check_pair("logit_softcaps", logit_softcaps, "the aligned model's and the base model's")
    _check_pair("logit_scales", logit_scales, "the aligned model's and the base model's")
    for softcap, scale in zip(logit_softcaps, logit_scales, strict=True):
        check_logit_options(softcap, scale, chunk_rows)
    call = _check_call((aligned_hidden, aligned_lm_head, base_hidden, base_lm_head), vocab_size, top_n, implementation)
    check_int("top_k", top_k)
    if top_k != 0:
        check_top("top_k", top_k, call.vocab_size)
    alpha: float | None = None
    space: Space = "logits"
    if contrast is not None:
        _check_pair("contrast", contrast, "(alpha, space)")
        alpha, space = contrast
        check_number("alpha", alpha, minimum=0.0)
        check_choice("space", space, get_args(Space))
    statistics = torch.ops.deepalign.linear_position_statistics(
        *call.matrices,
        top_n,
        top_k,
        call.vocab_size,
        chunk_rows or call.chunk_rows(buffers=2.0 if contrast is None else 8.0),  # eager Eq. 7 holds several copies
        logit_softcaps[0],
        logit_scales[0],
        logit_softcaps[1],
        logit_scales[1],
        alpha,
        space,
        call.serving,
    )
    return PositionStatistics(*(values.view(*call.rows, *values.shape[1:]) for values in statistics))


def _check_pair(name: str, value: object, expected: str) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected a tuple, {expected}")
    if len(value) != 2:
        raise ValueError(f"{name} is {value!r}; expected two, {expected}")


class _Call(NamedTuple):
    """Checked arguments of either op."""

    matrices: tuple[Tensor, ...]  # hidden states (N, H) and head of aligned, of base
    rows: torch.Size  # N as the caller has it
    vocab_size: int
    serving: str

    def chunk_rows(self, buffers: float) -> int:
        return choose_chunk_rows(self.rows.numel(), self.vocab_size, self.matrices[0].device, buffers)


def _check_call(given: tuple[Tensor, ...], vocab_size: int | None, top_n: int, implementation: str | None) -> _Call:
    aligned, aligned_head, base, base_head = map(under_autocast, given)
    vocab_size = check_models(vocab_size, {"aligned": (aligned, aligned_head), "base": (base, base_head)})
    check_top("top_n", top_n, vocab_size)
    serving = implementation_name(IMPLEMENTATIONS, implementation, aligned.device, compute_dtype(aligned))
    matrices = (aligned, aligned_head, base, base_head)
    flat = tuple(matrix.detach().reshape(-1, matrix.shape[-1]) for matrix in matrices)
    return _Call(flat, aligned.shape[:-1], vocab_size, serving)


class _Model(NamedTuple):
    """What makes a model's logits."""

    hidden_NH: Tensor
    lm_head_VH: Tensor
    softcap: float | None
    scale: float


@torch.no_grad()
def _measure_in_chunks(
    models: tuple[_Model, _Model],
    vocab_size: int,
    chunk_rows: int,
    measure: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    statistics: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Fill `statistics`, (N, ...) each, with what `measure` says of the logits (R, V) of a few rows after another."""
    hidden_NH = models[0].hidden_NH
    rows, device = hidden_NH.shape[0], hidden_NH.device
    shape = (min(chunk_rows, rows), vocab_size)
    buffers = [torch.empty(shape, dtype=compute_dtype(hidden_NH), device=device) for _ in models]
    block_rows = _block_rows(vocab_size, chunk_rows, device)
    with torch.autocast(device.type, enabled=False):
        for first in range(0, rows, chunk_rows):
            last = min(first + chunk_rows, rows)
            for model, out_RV in zip(models, buffers, strict=True):
                head = Head(model.hidden_NH[first:last], model.lm_head_VH[:vocab_size])
                logits_(head, model.scale, model.softcap, out_RV[: last - first])
            for start in range(0, last - first, block_rows):
                stop = min(start + block_rows, last - first)
                found = measure(*(out_RV[start:stop] for out_RV in buffers))
                for target, values in zip(statistics, found, strict=True):
                    target[first + start : first + stop] = values
    return statistics


def _block_rows(vocab_size: int, chunk_rows: int, device: torch.device) -> int:
    """Rows that the kernels read at a time: all of a chunk on a GPU, a few that stay in cache on a CPU."""
    if device.type != "cpu":
        return chunk_rows
    least = 2 * torch.get_num_threads()  # kernels deal rows to threads
    return max(1, min(chunk_rows, max(least, CPU_BLOCK_ELEMENTS // vocab_size)))


def _divergence(
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
    implementation = IMPLEMENTATIONS[name]
    assert isinstance(implementation, Implementation)
    models = (_Model(aligned_NH, aligned_lm_head, softcap, scale), _Model(base_NH, base_lm_head, softcap, scale))

    def measure(aligned_RV: Tensor, base_RV: Tensor) -> tuple[Tensor, ...]:
        return implementation.position_divergence(aligned_RV, base_RV, top_n, vocab_size)

    return _measure_in_chunks(models, vocab_size, chunk_rows, measure, _empty_divergence(aligned_NH))


def _statistics(
    aligned_NH: Tensor,
    aligned_lm_head: Tensor,
    base_NH: Tensor,
    base_lm_head: Tensor,
    top_n: int,
    top_k: int,
    vocab_size: int,
    chunk_rows: int,
    aligned_softcap: float | None,
    aligned_scale: float,
    base_softcap: float | None,
    base_scale: float,
    alpha: float | None,
    space: Space,
    name: str,
) -> tuple[Tensor, ...]:
    models = (
        _Model(aligned_NH, aligned_lm_head, aligned_softcap, aligned_scale),
        _Model(base_NH, base_lm_head, base_softcap, base_scale),
    )

    def measure(aligned_RV: Tensor, base_RV: Tensor) -> tuple[Tensor, ...]:
        if alpha is not None:
            aligned_RV = contrastive_logits(aligned_RV, base_RV, alpha=alpha, space=space)
        found = position_statistics(aligned_RV, base_RV, top_n=top_n, top_k=max(top_k, 1), implementation=name)
        return found._replace(favored_tokens=found.favored_tokens[:, :top_k])

    statistics = _empty_statistics(aligned_NH, aligned_lm_head, base_NH, base_lm_head, top_n, top_k)
    return _measure_in_chunks(models, vocab_size, chunk_rows, measure, statistics)


def _empty_divergence(aligned_hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _empty(aligned_hidden, counts=2)


def _empty_statistics(
    aligned_hidden: Tensor, aligned_lm_head: Tensor, base_hidden: Tensor, base_lm_head: Tensor, top_n: int, top_k: int,
    *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    tokens = aligned_hidden.new_empty(aligned_hidden.shape[0], top_k, dtype=torch.int64)
    return (*_empty(aligned_hidden, counts=3), tokens)


def _empty(aligned_hidden: Tensor, counts: int) -> tuple[Tensor, ...]:
    """Four statistics and some counts of every row."""
    rows, dtype = aligned_hidden.shape[0], compute_dtype(aligned_hidden)
    return tuple(aligned_hidden.new_empty(rows, dtype=kind) for kind in [dtype] * 4 + [torch.int64] * counts)


LIBRARY.impl("linear_position_divergence", _divergence, "CompositeExplicitAutograd")
torch.library.register_fake("deepalign::linear_position_divergence", _empty_divergence, lib=LIBRARY)
LIBRARY.impl("linear_position_statistics", _statistics, "CompositeExplicitAutograd")
torch.library.register_fake("deepalign::linear_position_statistics", _empty_statistics, lib=LIBRARY)

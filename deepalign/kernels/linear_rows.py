"""What the linear forms share: checks of hidden states and heads, logits of a chunk of rows, the size of a chunk.

A model's logits are z = softcap tanh(x / softcap) with x = scale h W^T, or x itself without a softcap, in float32
(float64 for float64). Only a chunk of rows of them exists at a time.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepalign.kernels.checks import LOGITS_DTYPES, check_dense, check_int, check_number, check_vocab_size, placements
from deepalign.kernels.products import product_


class ChunkSize(NamedTuple):
    """How `choose_chunk_rows` weighs memory against efficiency on a type of device."""

    budget: int  # bytes of all scratch together
    least: int  # rows below which re-reading the heads (CPU) or launches (GPU) dominate, whatever the memory
    most: int  # rows above which products get no faster


# On a CPU 64 rows take about 1.2 times as long per row as 128: the heads are read and packed twice as often
# (docs/log.md). A GPU's numbers are set by memory, not measured.
CHUNK_SIZES = {"cpu": ChunkSize(budget=192 << 20, least=128, most=512)}
DEVICE_CHUNK_SIZE = ChunkSize(budget=2200 << 20, least=256, most=4096)
ROW_MULTIPLE = 8  # rows that the CPU's product takes at a time; a GPU's tiles are multiples of it


class Head(NamedTuple):
    """One model: its rows of hidden states and its head, cut to the vocabulary that exists."""

    hidden_NH: Tensor
    lm_head_VH: Tensor


def check_models(vocab_size: int | None, models: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """Check hidden states (..., H) and heads (V, H) of several models; H may differ, so may V if `vocab_size` is given.

    Args:
        vocab_size: number of leading entries that exist, None for all.
        models: by name, (hidden, lm_head).

    Returns:
        The number of entries that exist.

    Raises:
        TypeError: one is not a tensor, or dtypes do not fit.
        ValueError: shapes, devices or `vocab_size` do not fit; a head is sharded or not there.
    """
    for name, (hidden, lm_head) in models.items():
        _check_tensor(f"{name}_hidden", hidden)
        _check_tensor(f"{name}_lm_head", lm_head)
        _check_model(name, hidden, lm_head)
    first_name, (first, first_head) = next(iter(models.items()))
    for name, (hidden, lm_head) in models.items():
        if hidden.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"{name}_hidden has rows {tuple(hidden.shape[:-1])} and {first_name}_hidden {tuple(first.shape[:-1])}; "
                "expected the same rows (tokens) of every model, hidden sizes may differ"
            )
        if hidden.device != first.device:
            raise ValueError(
                f"{name}_hidden is on {hidden.device} and {first_name}_hidden on {first.device}; expected one device: "
                "move one"
            )
        if (hidden.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(
                f"{name}_hidden is {hidden.dtype} and {first_name}_hidden is {first.dtype}; expected all float64 or "
                "none: convert the others"
            )
        if vocab_size is None and lm_head.shape[0] != first_head.shape[0]:
            raise ValueError(
                f"{name}_lm_head is {lm_head.shape[0]} wide and {first_name}_lm_head {first_head.shape[0]}; expected "
                "one width, or vocab_size, the number of leading entries that they share"
            )
    return check_vocab_size(vocab_size, min(lm_head.shape[0] for _, lm_head in models.values()))


def _check_tensor(name: str, tensor: object) -> None:
    if isinstance(tensor, nn.Module):
        raise TypeError(
            f"{name} is a module, {type(tensor).__name__}; expected its weight, a tensor (V, H): pass "
            "deepalign.lm_head_weight(module), which also sees adapters"
        )
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    if (spread := placements(tensor)) is not None:
        raise ValueError(
            f"{name} is a DTensor {spread}; expected a whole tensor: gather it (.full_tensor()), or call "
            "the loss inside the forward of the module that FSDP wraps. Vocabulary-parallel heads are not supported"
        )
    if tensor.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected bf16, fp16, fp32 or fp64: convert it first")
    check_dense(name, tensor)


def _check_model(name: str, hidden: Tensor, lm_head: Tensor) -> None:
    if hasattr(lm_head, "ds_shape") and lm_head.numel() == 0:
        raise ValueError(
            f"{name}_lm_head is partitioned by ZeRO-3 and empty here; expected the whole head: call the loss inside "
            "the forward of the module that the engine wraps, or gather it with deepspeed.zero.GatheredParameters"
        )
    if lm_head.dim() != 2 or 0 in lm_head.shape:
        raise ValueError(
            f"{name}_lm_head has shape {tuple(lm_head.shape)}; expected (V, H), a row per vocabulary entry"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != lm_head.shape[1]:
        raise ValueError(
            f"{name}_hidden has shape {tuple(hidden.shape)} and {name}_lm_head {tuple(lm_head.shape)}; expected "
            "(..., H) and (V, H) with one H"
        )
    if hidden.dtype != lm_head.dtype:
        raise TypeError(
            f"{name}_hidden is {hidden.dtype} and {name}_lm_head is {lm_head.dtype}; expected one dtype per model: "
            "convert one, or run under torch.autocast"
        )
    if hidden.device != lm_head.device:
        raise ValueError(
            f"{name}_hidden is on {hidden.device} and {name}_lm_head on {lm_head.device}; expected one device: move one"
        )


def check_logit_options(logit_softcap: float | None, logit_scale: float, chunk_rows: int | None) -> None:
    """Check what makes logits of h W^T, and the caller's chunk.

    Raises:
        TypeError: not numbers, `chunk_rows` not an int.
        ValueError: softcap not above 0, scale not finite, `chunk_rows` below 1.
    """
    if logit_softcap is not None:
        check_number("logit_softcap", logit_softcap, above=0.0)
    check_number("logit_scale", logit_scale)
    if chunk_rows is not None:
        check_int("chunk_rows", chunk_rows)
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows is {chunk_rows}; expected at least 1, or None to choose")


def under_autocast(tensor: Tensor) -> Tensor:
    """As a linear layer takes it: in autocast's dtype where autocast is on (float64 stays), differentiably."""
    if not isinstance(tensor, Tensor):
        return tensor  # for the checks to refuse
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return tensor
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def choose_chunk_rows(rows: int, vocab_size: int, device: torch.device, buffers: float, besides: int = 0) -> int:
    """How many rows of logits to hold at a time: as the budget allows, but no fewer than products need to be efficient.

    Args:
        rows: of the whole call; they are dealt evenly, so that the last chunk is not a small one.
        vocab_size: entries of a row.
        device: where.
        buffers: float32 entries held per entry of a chunk's logits.
        besides: bytes of the budget that something else takes.
    """
    size = CHUNK_SIZES.get(device.type, DEVICE_CHUNK_SIZE)
    wanted = int((size.budget - besides) / (4 * buffers * vocab_size))
    wanted = max(size.least, min(size.most, wanted // ROW_MULTIPLE * ROW_MULTIPLE))
    chunks = max(1, -(-rows // wanted))
    even = -(-rows // chunks)
    return max(1, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE)


def logits_(head: Head, scale: float, softcap: float | None, out_RV: Tensor) -> None:
    """out = softcap tanh(scale h W^T / softcap) for the rows of `head.hidden_NH`, in the precision of `out_RV`."""
    product_(head.hidden_NH, head.lm_head_VH.t(), out_RV)
    if softcap is not None:
        out_RV.mul_(scale / softcap).tanh_().mul_(softcap)
    elif scale != 1.0:
        out_RV.mul_(scale)

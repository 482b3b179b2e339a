"""From response masks to row weights: which token rows the loss reads, and how much each counts.

A causal model's logits at position t predict token t + 1. A mask over tokens ("this is an answer") therefore becomes a
choice of rows shifted by one, which is the step that is easiest to get wrong in a trainer of one's own:

    selected = response_mask_to_row_weights(response_mask_BT, completion=is_harmful_B)
    hidden_RH = hidden_BTH.flatten(0, 1)[selected.row_index]      # of all three models
    output = fused_linear_completion_loss(
        hidden_RH, lm_head, ...,
        kl_weight=selected.kl_weight, completion_weight=selected.completion_weight, reduction="sum",
    )

`StepDataset` calls it too.
"""

from typing import NamedTuple

import torch


class SelectedRows(NamedTuple):
    """R of the B*T rows, and their weights, divided: the loss over them is to be summed.

    `row_index` (R,) int64 into the flattened B*T positions, ascending; `kl_weight`, `completion_weight` (R,) fp32.
    """

    row_index: torch.Tensor
    kl_weight: torch.Tensor
    completion_weight: torch.Tensor


def response_mask_to_row_weights(
    response_mask: torch.Tensor,
    *,
    kl: float | torch.Tensor = 1.0,
    completion: float | torch.Tensor = 1.0,
    kl_denominator: float | None = None,
    completion_denominator: float | None = None,
    world_size: int = 1,
) -> SelectedRows:
    """The rows that predict answer tokens, with weights for `fused_completion_loss(..., reduction="sum")`.

    Args:
        response_mask: (B, T), True (or 1) at the tokens of answers, the end-of-turn token included.
        kl, completion: what an answer's tokens weigh in the distillation and in the penalty: one number, a tensor (B,)
            with one per sequence (its stream: harmful or utility), or (B, T) with one per token.
        kl_denominator, completion_denominator: what the weights are divided by. None: their sum over this batch, right
            for one process without accumulation. Otherwise the sum over the whole optimizer step, all ranks and all
            accumulated micro-batches (`weight_sums` gives a batch's part). A term without weight stays 0.
        world_size: ranks over which gradients are averaged afterwards; weights are multiplied by it.

    Returns:
        The rows with a weight; the token after row `row_index[i]` is the answer token it predicts. On the device of
        `response_mask`. Reading the mask synchronises with a GPU: keep masks on the CPU where they are made.

    Raises:
        ValueError: not (B, T), values other than 0 and 1, negative or other-shaped weights, or an answer that starts
            at the first position, which no row predicts.
    """
    mask_BT = _checked_mask(response_mask)
    kl_BT, completion_BT = (
        _per_token(name, value, mask_BT) for name, value in (("kl", kl), ("completion", completion))
    )
    # the row before a token predicts it; the last row of a sequence predicts nothing
    predicts_BT = torch.zeros_like(mask_BT)
    predicts_BT[:, :-1] = (mask_BT & ((kl_BT > 0) | (completion_BT > 0)))[:, 1:]
    row_index = predicts_BT.flatten().nonzero().flatten()
    kl_R, completion_R = (weight_BT.flatten()[row_index + 1] for weight_BT in (kl_BT, completion_BT))
    return SelectedRows(
        row_index,
        _divided(kl_R, kl_denominator, world_size),
        _divided(completion_R, completion_denominator, world_size),
    )


def weight_sums(
    response_mask: torch.Tensor, *, kl: float | torch.Tensor = 1.0, completion: float | torch.Tensor = 1.0
) -> tuple[float, float]:
    """A batch's part of the two denominators: sums over answer tokens of `kl` and of `completion`.

    Add them up over micro-batches and ranks (`all_reduce`) before the first `response_mask_to_row_weights` of a step.
    Arguments and errors are those of `response_mask_to_row_weights`.
    """
    mask_BT = _checked_mask(response_mask)
    kl_BT, completion_BT = (
        _per_token(name, value, mask_BT) for name, value in (("kl", kl), ("completion", completion))
    )
    return float(kl_BT[mask_BT].sum()), float(completion_BT[mask_BT].sum())


def _checked_mask(mask: torch.Tensor) -> torch.Tensor:
    if mask.ndim != 2 or mask.shape[1] == 0:
        raise ValueError(f"response_mask has shape {tuple(mask.shape)}; expected (sequences, tokens)")
    mask_BT = mask.bool()
    if mask.is_floating_point() or not torch.equal(mask_BT.to(mask.dtype), mask):
        raise ValueError("response_mask holds values other than 0 and 1; weights go into `kl` and `completion`")
    if bool(mask_BT[:, 0].any()):
        raise ValueError(
            "response_mask marks the first token of a sequence, which no row predicts; expected a prompt before it"
        )
    return mask_BT


def _per_token(name: str, weight: float | torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    weights = torch.as_tensor(weight, dtype=torch.float64, device=mask_BT.device)
    if weights.shape not in ((), mask_BT.shape[:1], mask_BT.shape):
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)}; expected a number, {tuple(mask_BT.shape[:1])} or "
            f"{tuple(mask_BT.shape)}"
        )
    if not bool((weights >= 0).all()) or bool(weights.isinf().any()):
        raise ValueError(f"{name} holds negative weights, infinities or NaN; expected weights >= 0")
    return (weights[:, None] if weights.ndim == 1 else weights).expand_as(mask_BT)


def _divided(weights: torch.Tensor, denominator: float | None, world_size: int) -> torch.Tensor:
    """weights * world_size / denominator, in fp32; a term that no row of the step carries stays 0."""
    total = float(weights.sum()) if denominator is None else denominator
    return (weights * (world_size / total if total > 0 else 0.0)).to(torch.float32)

"""What Eq. 7 did to a step: per row, at temperature 1 and before any filter.

    favored       log p_b(v) > log p_a(v)
    penalty       a_y - x_y, logits taken off the drawn token y
    favored_mass  sum over favored v of p_a(v): how much of aligned's distribution could be lowered
    mass_taken    sum over v of max(p_a(v) - p_x(v), 0): how much of it moved elsewhere (total variation)

p_a, p_b and p_x are softmax of aligned's, base's and the contrastive logits. Eager: it reads the vocabulary again, so
it runs only where it is asked for.
"""

import torch
from torch import Tensor

from deepalign.kernels.contrastive_sample import Space, contrastive_logits

NAMES = ("base_favored", "penalty", "favored_mass", "mass_taken")


def penalty_statistics(
    aligned_BV: Tensor, base_BV: Tensor, token_ids_B: Tensor, *, alpha: float, space: Space
) -> Tensor:
    """(B, 4) fp32, in the order of `NAMES`; `base_favored` is 0 or 1. A token -1 (a bad row) gives NaN."""
    x_BV = contrastive_logits(aligned_BV, base_BV, alpha=alpha, space=space)
    a_BV, b_BV = aligned_BV.to(x_BV.dtype), base_BV.to(x_BV.dtype)
    log_a_BV, log_b_BV = a_BV.log_softmax(-1), b_BV.log_softmax(-1)
    favored_BV = log_b_BV > log_a_BV
    p_a_BV = log_a_BV.exp()
    token_B1 = token_ids_B.clamp(min=0)[:, None]
    columns = (
        favored_BV.gather(-1, token_B1).squeeze(-1).to(x_BV.dtype),
        (a_BV - x_BV).gather(-1, token_B1).squeeze(-1),
        torch.where(favored_BV, p_a_BV, 0.0).sum(-1),
        (p_a_BV - x_BV.softmax(-1)).clamp(min=0).sum(-1),
    )
    return torch.where(token_ids_B[:, None] < 0, torch.nan, torch.stack(columns, dim=-1)).float()

"""Products with a gradient of logits on a GPU, as exact as in float32 at the speed of half precision.

A gradient G rounded to bfloat16 (8 bits) gives dh = G W and dW = G^T h 1.4 times the error of a product in float32 that
is rounded once; float16 has 11 bits, but a range of 40 powers of 2. So every row of G is scaled by a power of 2,
exactly, until its largest entry is just below 2^15, and bfloat16 operands by powers of 2 likewise: 8 bits fit into 11,
from the largest entry down to 2^-32 of it; what is smaller loses digits that no sum would show.

    dh_n = 2^(e_n - 15) (2^(15 - e_n) G_n) (w W) / w
    2^c dW += sum over n of (2^(15 - e_n) G_n)^T (2^(c + e_n - 15) h_n)

e_n: exponent of a row's largest entry. c, one number for all of dW, leaves room for rows 2^10 times as large as any
before; where larger ones come, the sum is scaled down. All of it happens on the device: nothing is waited for.
"""

import torch
from torch import Tensor

from deepalign.kernels.library import WHY_NO_TRITON

TOP = 15  # float16 ends at 2^16
ROOM = 10
LEAST = -90  # exponents below count as this one, so that powers of 2 and what they undo stay in float32's range


def power_of_2(exponent: Tensor) -> Tensor:
    """2^exponent in float32, exactly; exponents are in [-126, 127], or cut."""
    return ((exponent.clamp(-126, 127) + 127).to(torch.int32) << 23).view(torch.float32)


def exponents(matrix: Tensor) -> Tensor:
    """Per row e such that its largest magnitude is in [2^(e-1), 2^e); int32, `LEAST` for zeros."""
    largest = torch.linalg.vector_norm(matrix, torch.inf, dim=-1).float()
    return torch.where(largest == 0, LEAST, torch.frexp(largest).exponent.clamp(min=LEAST))


def scaled_half(matrix: Tensor, exponent: Tensor) -> Tensor:
    """Rows times 2^exponent in float16, without a float32 copy of them."""
    half = torch.empty(matrix.shape, dtype=torch.float16, device=matrix.device)
    return torch.mul(matrix, power_of_2(exponent).unsqueeze(-1), out=half)


class HalfProducts:
    """Adds up dh and 2^c dW of chunks of rows.

    Args:
        lm_head_VH: bf16 or fp16. A bf16 head is copied, scaled, if dh is wanted.
        sum_VH: float32 zeros for dW, or None.
    """

    def __init__(self, lm_head_VH: Tensor, sum_VH: Tensor | None, dhidden: bool) -> None:
        self.sum_VH = sum_VH
        self.shift = torch.full((1,), 10**6, dtype=torch.int32, device=lm_head_VH.device)  # c; no row is that small
        if dhidden:
            by = torch.zeros(1, dtype=torch.int32, device=lm_head_VH.device)
            if lm_head_VH.dtype != torch.float16:
                by = TOP - exponents(lm_head_VH.reshape(1, -1))
                lm_head_VH = scaled_half(lm_head_VH, by)
            self.lm_head_VH, self.lm_head_shift = lm_head_VH, by

    def add(self, dlogits_RV: Tensor, hidden_RH: Tensor, dhidden: bool) -> Tensor | None:
        """dh of a chunk in float32, if wanted; its part of dW is added."""
        exponent_R = exponents(dlogits_RV)
        half_RV = scaled_half(dlogits_RV, TOP - exponent_R)
        if self.sum_VH is not None:
            self._add_to_head(half_RV, exponent_R, hidden_RH)
        if not dhidden:
            return None
        dhidden_RH = wide_product(half_RV, self.lm_head_VH)
        return dhidden_RH.mul_(power_of_2(exponent_R - TOP).unsqueeze(-1)).mul_(power_of_2(-self.lm_head_shift))

    def _add_to_head(self, half_RV: Tensor, exponent_R: Tensor, hidden_RH: Tensor) -> None:
        assert self.sum_VH is not None
        largest = (exponent_R + exponents(hidden_RH)).amax().clamp(min=LEAST)
        shift = torch.where(largest + self.shift > 2 * TOP, 2 * TOP - ROOM - largest, self.shift)
        scale_sum_(self.sum_VH, power_of_2(shift - self.shift))
        self.shift = shift
        scaled_RH = scaled_half(hidden_RH, exponent_R - TOP + shift)
        wide_product(half_RV.t(), scaled_RH, add_to=self.sum_VH)

    def write_head_gradient(self, out_VH: Tensor) -> None:
        """dW, rounded once."""
        assert self.sum_VH is not None
        torch.mul(self.sum_VH, power_of_2(-self.shift), out=out_VH)


def scale_sum_(sum_VH: Tensor, factor: Tensor) -> None:
    """Multiply by one number; where it is 1, which is nearly always, a kernel that looks costs nothing."""
    if sum_VH.is_cuda and WHY_NO_TRITON is None:
        from deepalign.kernels.scale_rows import scale_rows_

        scale_rows_(sum_VH, factor.expand(sum_VH.shape[0]))
    else:
        sum_VH.mul_(factor)


def wide_product(left: Tensor, right: Tensor, add_to: Tensor | None = None) -> Tensor:
    """left right of float16 matrices in float32, or add_to += left right."""
    if left.is_cuda:
        if add_to is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        torch.ops.aten.addmm.dtype_out(add_to, left, right, torch.float32, out=add_to)
        return add_to
    # What a GPU computes, for tests: exact products, summed in float32.
    left, right = left.float(), right.float()
    return left @ right if add_to is None else add_to.addmm_(left, right)

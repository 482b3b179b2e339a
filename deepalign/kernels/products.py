"""Products of matrices with a float32 result, whatever the operands are.

bf16 spacing at |z| ~ 16 is 0.125: logits rounded to it would be all ties in a difference of two models. So products of
half-precision matrices must not be rounded to their operands' dtype. Per device:

    "torch"        operands of the result's dtype: `torch.mm`
    "out_dtype"    half precision on a GPU: `torch.mm(..., out_dtype=torch.float32)`, tensor cores with fp32 sums
    "native_bf16"  bfloat16 on a CPU with AVX-512 BF16: `csrc/cpu/gemm_bf16.h`
    "blocks"       other half precision on a CPU: the right matrix converted to float32 block by block, in cache, then
                   multiplied by torch's float32 product

A left operand in float32 (the gradient of logits) is not rounded, or so that nobody notices: dh and dW err like
products in float32. "native_bf16" multiplies it as the sum of two bfloat16 terms, the second only where it matters:
above `row_levels`, if these are passed on. On a GPU `half_products.py` makes it float16, scaled row by row.
"""

import torch
from torch import Tensor

from deepalign.kernels.library import LIBRARY, WHY_NO_NATIVE

# float32 entries of a converted block. Measured, 128 x 2048 x 32064: 110 ms with 2 MiB, 106 with 8, 158 with 32.
BLOCK_ELEMENTS = 1 << 21

LIBRARY.define("gemm_bf16_(Tensor left, Tensor right, Tensor(a!) out, bool accumulate, Tensor? levels=None) -> ()")
LIBRARY.define("row_levels(Tensor matrix) -> Tensor")


@torch.library.register_fake("deepalign::gemm_bf16_", lib=LIBRARY)
def _fake_gemm(left: Tensor, right: Tensor, out: Tensor, accumulate: bool, levels: Tensor | None = None) -> None:
    return None


@torch.library.register_fake("deepalign::row_levels", lib=LIBRARY)
def _fake_levels(matrix: Tensor) -> Tensor:
    return matrix.new_empty(matrix.shape[0])


def product_route(device: torch.device, dtype: torch.dtype) -> str:
    """Which of the module's routes multiplies matrices of `dtype` on `device`."""
    if dtype in (torch.float32, torch.float64):
        return "torch"
    if device.type != "cpu":
        return "out_dtype"
    native = dtype == torch.bfloat16 and WHY_NO_NATIVE is None and torch.ops.deepalign.has_gemm_bf16()
    return "native_bf16" if native else "blocks"


def row_levels(gradient_RV: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What `product_` needs to know of a float32 gradient of logits that it multiplies with matrices of `dtype`."""
    route = product_route(gradient_RV.device, dtype)
    return torch.ops.deepalign.row_levels(gradient_RV) if route == "native_bf16" else None


def product_(
    left_MK: Tensor, right_KN: Tensor, out_MN: Tensor, *, accumulate: bool = False, levels: Tensor | None = None
) -> None:
    """out = left right, or out += left right.

    Args:
        left_MK: of the right one's dtype, or float32 on a CPU.
        right_KN: bf16, fp16, fp32 or fp64; decides the route.
        out_MN: float32 (float64 for float64 operands), contiguous in its columns.
        accumulate: add to `out_MN` instead of overwriting it.
        levels: `row_levels` of the left operand, or of the matrix whose transpose it is.
    """
    if 0 in (left_MK.shape[0], right_KN.shape[1]):
        return
    if left_MK.shape[1] == 0:
        if not accumulate:
            out_MN.zero_()
        return
    route = product_route(right_KN.device, right_KN.dtype)
    if route == "torch":
        out_MN.addmm_(left_MK, right_KN, beta=int(accumulate))
    elif route == "native_bf16":
        left_MK, right_KN = _one_stride_is_1(left_MK), _one_stride_is_1(right_KN)
        torch.ops.deepalign.gemm_bf16_(left_MK, right_KN, out_MN, accumulate, levels)
    elif route == "out_dtype":
        if accumulate:
            torch.ops.aten.addmm.dtype_out(out_MN, left_MK, right_KN, torch.float32, out=out_MN)
        else:
            torch.ops.aten.mm.dtype_out(left_MK, right_KN, torch.float32, out=out_MN)
    else:
        _product_by_blocks(left_MK.float(), right_KN, out_MN, accumulate)


def _product_by_blocks(left_MK: Tensor, right_KN: Tensor, out_MN: Tensor, accumulate: bool) -> None:
    """Blocks along the longer side of the right matrix: of the vocabulary, where one matrix is a head."""
    depth, columns = right_KN.shape
    if columns >= depth:
        width = max(1, BLOCK_ELEMENTS // depth)
        for first in range(0, columns, width):
            block = slice(first, first + width)
            out_MN[:, block].addmm_(left_MK, right_KN[:, block].float(), beta=int(accumulate))
        return
    width = max(1, BLOCK_ELEMENTS // columns)
    for first in range(0, depth, width):
        block = slice(first, first + width)
        out_MN.addmm_(left_MK[:, block], right_KN[block].float(), beta=int(accumulate or first > 0))


def _one_stride_is_1(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.contiguous()

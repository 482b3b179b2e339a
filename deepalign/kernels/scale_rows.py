"""Rows of a matrix multiplied in place on a GPU, by factors that the device looks at: 1 costs nothing."""

import triton
import triton.language as tl
from torch import Tensor


def scale_rows_(matrix: Tensor, factors: Tensor) -> Tensor:
    """Scale the rows (N, V) whose factor (N,) is not 1, in place."""
    if matrix.numel():
        scale_kernel[(matrix.shape[0],)](
            matrix, factors, matrix.stride(0), factors.stride(0), matrix.shape[1], BLOCK=2048, num_warps=8
        )
    return matrix


@triton.jit
def scale_kernel(x_ptr, factor_ptr, stride_x, stride_f, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row * stride_f).to(tl.float32)
    if factor != 1.0:
        x_ptr += row * stride_x
        for first in range(0, width, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32) * factor
            tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < width)

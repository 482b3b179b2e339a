"""Rows of a matrix multiplied in place on a GPU, by factors that the device looks at: 1 costs nothing."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PROGRAMS = 2048  # of a launch: enough to fill a device, and few to start where nothing is to be done


def scale_rows_(matrix: Tensor, factors: Tensor) -> Tensor:
    """Scale the rows (..., V) whose factor (...,) is not 1, in place.

    Args:
        matrix: floating; products in fp32 (fp64 of fp64), rounded once.
        factors: floating, on the same device, of any strides; what its rows' factor 1 leaves alone is not read.
    """
    if matrix.dim() > 2:
        for part, of_part in zip(matrix, factors, strict=True):
            scale_rows_(part, of_part)
    elif matrix.dim() == 1:
        scale_rows_(matrix.unsqueeze(0), factors.unsqueeze(0))
    elif matrix.numel() and matrix.stride(1) != 1:
        matrix.mul_(factors.unsqueeze(1))
    elif matrix.numel():
        rows, width = matrix.shape
        with torch.cuda.device_of(matrix):  # Triton launches on the current device
            scale_kernel[(min(rows, MOST_PROGRAMS),)](
                matrix, factors, rows, matrix.stride(0), factors.stride(0), width, BLOCK=2048, num_warps=8
            )
    return matrix


@triton.jit(do_not_specialize=["rows", "stride_f"], do_not_specialize_on_alignment=["factor_ptr"])
def scale_kernel(x_ptr, factor_ptr, rows, stride_x, stride_f, width, BLOCK: tl.constexpr):
    """Every program takes every num_programs-th of the rows (N, V) of x and their factors (N,)."""
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        factor = tl.load(factor_ptr + row * stride_f).to(wide)
        if factor != 1.0:
            row_ptr = x_ptr + row * stride_x
            for first in range(0, width, BLOCK):
                at = first + tl.arange(0, BLOCK)
                x = tl.load(row_ptr + at, mask=at < width, other=0.0).to(wide)
                x = tl.where(x == 0.0, x, x * factor)  # what has no gradient gets none from an infinite factor
                tl.store(row_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < width)

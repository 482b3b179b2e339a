"""The sampler by the compiled kernels behind the op: the CPU's, and by the same calls Triton's.

`csrc/cpu/contrastive_sample.h` has the CPU kernels' essay.
"""

import torch
from torch import Tensor

from deepalign.kernels.contrastive_sample.op import op_arguments
from deepalign.kernels.contrastive_sample.reference import ContrastiveSample, SampleOptions
from deepalign.kernels.library import dense_rows

OP = torch.ops.deepalign.contrastive_sample.default


def contrastive_sample_rows(
    aligned_NV: Tensor, base_NV: Tensor, uniforms_N: Tensor, options: SampleOptions
) -> ContrastiveSample:
    """One token per row of (..., V) logits; inputs are validated, uniforms are float64."""
    # A call on one row takes tens of microseconds and a view two: rows already in line are left alone.
    in_line = aligned_NV.dim() == 2
    sampled = OP(
        dense_rows(aligned_NV),
        dense_rows(base_NV),
        uniforms_N if in_line and uniforms_N.is_contiguous() else uniforms_N.reshape(-1).contiguous(),
        *op_arguments(options),
    )
    return ContrastiveSample(*(sampled if in_line else (values.view(aligned_NV.shape[:-1]) for values in sampled)))

"""The sampler as a `torch.library` op: schema and fake kernel; kernels join it per device. It has no gradient."""

from typing import Any

import torch
from torch import Tensor

from deepalign.kernels.contrastive_sample.reference import SampleOptions
from deepalign.kernels.library import LIBRARY, implement_on_gpu

LIBRARY.define(
    "contrastive_sample(Tensor aligned, Tensor base, Tensor uniforms, float alpha, float temperature, int top_k, "
    "float top_p, float min_p, bool log_space, SymInt? vocab_size) -> (Tensor token_ids, Tensor logprobs)"
)
implement_on_gpu("contrastive_sample", "contrastive_sample")
# One step of a call less: results carry no gradient, whatever the logits do.
LIBRARY.impl("contrastive_sample", torch.library.fallthrough_kernel, "Autograd")


def op_arguments(options: SampleOptions) -> tuple[Any, ...]:
    """What the op takes after logits (N, V) and uniforms (N,) in float64."""
    return (
        options.alpha,
        options.temperature,
        options.top_k,
        options.top_p,
        options.min_p,
        options.space == "logprobs",
        options.vocab_size,
    )


@torch.library.register_fake("deepalign::contrastive_sample", lib=LIBRARY)
def _fake(aligned: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    rows = aligned.shape[0]
    return aligned.new_empty(rows, dtype=torch.int64), aligned.new_empty(rows, dtype=torch.float32)

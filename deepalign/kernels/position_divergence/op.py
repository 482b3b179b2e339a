"""The position statistics as `torch.library` ops: schemas and fake kernels; kernels join them per device.

They have no gradient. `position_statistics` has a kernel on the CPU only; `statistics.py` does without elsewhere.
"""

import torch
from torch import Tensor

from deepalign.kernels.library import LIBRARY, implement_on_gpu

LIBRARY.define(
    "position_divergence(Tensor aligned, Tensor base, int top_n, SymInt vocab_size) -> (Tensor kl, Tensor reverse_kl, "
    "Tensor jsd, Tensor top_overlap, Tensor favored_count, Tensor favored_in_top)"
)
LIBRARY.define(
    "position_statistics(Tensor aligned, Tensor base, int top_n, int top_k, SymInt vocab_size) -> (Tensor kl, "
    "Tensor reverse_kl, Tensor jsd, Tensor top_overlap, Tensor favored_count, Tensor favored_in_top, "
    "Tensor favored_in_base_top, Tensor favored_tokens)"
)
LIBRARY.define(
    "base_favored_tokens(Tensor aligned, Tensor base, int top_k, SymInt vocab_size) -> (Tensor indices, "
    "Tensor differences, Tensor count)"
)
implement_on_gpu("position_divergence", "position_divergence", "base_favored_tokens")


@torch.library.register_fake("deepalign::position_divergence", lib=LIBRARY)
def _fake_divergence(aligned: Tensor, base: Tensor, top_n: int, vocab_size: int) -> tuple[Tensor, ...]:
    rows = aligned.shape[0]
    return tuple(aligned.new_empty(rows, dtype=dtype) for dtype in [torch.float32] * 4 + [torch.int64] * 2)


@torch.library.register_fake("deepalign::position_statistics", lib=LIBRARY)
def _fake_statistics(aligned: Tensor, base: Tensor, top_n: int, top_k: int, vocab_size: int) -> tuple[Tensor, ...]:
    rows = aligned.shape[0]
    per_row = [aligned.new_empty(rows, dtype=dtype) for dtype in [torch.float32] * 4 + [torch.int64] * 3]
    return (*per_row, aligned.new_empty(rows, top_k, dtype=torch.int64))


@torch.library.register_fake("deepalign::base_favored_tokens", lib=LIBRARY)
def _fake_favored(aligned: Tensor, base: Tensor, top_k: int, vocab_size: int) -> tuple[Tensor, ...]:
    rows = aligned.shape[0]
    return (
        aligned.new_empty(rows, top_k, dtype=torch.int64),
        aligned.new_empty(rows, top_k, dtype=torch.float32),
        aligned.new_empty(rows, dtype=torch.int64),
    )

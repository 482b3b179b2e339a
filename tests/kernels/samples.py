"""Logits to test on: peaked like a language model's or plain noise, and the greedy cover of pairs of options."""

import itertools
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_FOR

Case = dict[str, object]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# (rows, vocabulary, dtype, peaked): every dtype at every small size, the oracle's slow large ones once
SMALL = ((3, 1), (3, 7), (1, 100), (3, 128))
SIZES = [(*size, dtype, peaked) for size in SMALL for dtype in DTYPES for peaked in (True, False)]
SIZES += [(2, 4096, dtype, True) for dtype in DTYPES]
SIZES += [(3, 4096, torch.float32, False), (1, 32000, torch.bfloat16, True), (1, 32000, torch.float32, True)]


def runnable_on_cpu(implementations: Mapping[str, object]) -> list[str]:
    """Names of those that are built here and run on the CPU's tensors."""
    return [
        name
        for name, found in implementations.items()
        if not isinstance(found, str) and COMPILED_FOR.get(name, "cpu") == "cpu"
    ]


def three_models(*shape: int, dtype: torch.dtype = torch.float32, peaked: bool = True, seed: int = 0) -> list[Tensor]:
    """Student, aligned and base logits (..., V).

    Peaked: a shared heavy-tailed shape with a few tokens far above, the base model apart from the aligned one and the
    student close to it, as in training.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if not peaked:
        return [noise().to(dtype) for _ in range(3)]
    shared = 3.0 * noise() - 4.0
    shared = torch.where(noise() > 2.2, shared + 14.0, shared)
    aligned = shared + 0.7 * noise()
    return [(aligned + 0.3 * noise()).to(dtype), aligned.to(dtype), (shared + 1.5 * noise()).to(dtype)]


def largest(values: Tensor, k: int) -> Tensor:
    """(N, k) indices of the largest of (N, V), descending, ties to the lowest index; -0.0 ties with 0.0."""
    edge = values.topk(k, dim=-1).values[:, -1:]
    above, tied = values > edge, values == edge
    chosen = above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    indices = chosen.nonzero()[:, 1].view(len(values), k)
    order = (values.gather(-1, indices) + 0.0).sort(dim=-1, descending=True, stable=True).indices
    return indices.gather(-1, order)


def pairwise(options: dict[str, Sequence[object]], seed: int = 0) -> list[Case]:
    """Few combinations in which every pair of values of every two options occurs."""
    names = list(options)
    candidates = list(itertools.product(*options.values()))
    random.Random(seed).shuffle(candidates)
    covered: set[tuple[int, object, int, object]] = set()
    sizes = [len(values) for values in options.values()]
    all_pairs = sum(left * right for left, right in itertools.combinations(sizes, 2))
    cases: list[Case] = []
    for values in candidates:
        if len(covered) == all_pairs:
            break
        pairs = {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(names)), 2)}
        if not pairs <= covered:
            covered |= pairs
            cases.append(dict(zip(names, values, strict=True)))
    return cases

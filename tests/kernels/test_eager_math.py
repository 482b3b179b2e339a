"""The shared row arithmetic: top-k with its tie rule."""

import pytest
import torch

from deepalign.kernels.eager_math import top_k_lowest_index


@pytest.mark.parametrize("levels", [2, 5, 1000], ids=lambda levels: f"{levels}-levels")
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (7, 7), (40, 3), (5000, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_top_k_is_a_stable_descending_sort(dtype: torch.dtype, vocab: int, k: int, levels: int) -> None:
    """Few levels give ties everywhere, among them at the k-th place."""
    generator = torch.Generator().manual_seed(vocab + levels)
    values = torch.randint(-levels // 2, levels // 2 + 1, (3, 4, vocab), generator=generator).to(dtype)
    values = torch.where(torch.rand(values.shape, generator=generator) < 0.5, values, -values)  # both zeros
    present = torch.rand(values.shape, generator=generator) < 0.9
    index, found = top_k_lowest_index(values, present, k)
    for row in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        row_values, row_present = values[tuple(row)].tolist(), present[tuple(row)].tolist()
        kept = [v for v in range(vocab) if row_present[v]]
        expected = sorted(kept, key=lambda v: (-row_values[v], v))[:k]
        assert index[tuple(row)][found[tuple(row)]].tolist() == expected
        assert len(set(index[tuple(row)].tolist())) == k

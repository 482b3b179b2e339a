"""Position statistics and base-favored tokens against float64, row by row."""

import math

import pytest
import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.position_divergence import (
    IMPLEMENTATIONS,
    PositionDivergence,
    base_favored_tokens,
    position_divergence,
)
from tests.kernels.oracle import (
    descending,
    difference_in_compute_dtype,
    divergence_row,
    favored_bounds,
    present_entries,
)
from tests.kernels.samples import DTYPES, SIZES, runnable_on_cpu, three_models

RUNNABLE = runnable_on_cpu(IMPLEMENTATIONS)
each_implementation = pytest.mark.parametrize("implementation", RUNNABLE)
NAN, INF = math.nan, math.inf


def takes(implementation: str, dtype: torch.dtype) -> bool:
    return implementation == "reference" or dtype in COMPILED_DTYPES


def check_divergence(
    aligned: Tensor, base: Tensor, *, top_n: int, vocab_size: int | None = None, implementation: str
) -> PositionDivergence:
    result = position_divergence(aligned, base, top_n=top_n, vocab_size=vocab_size, implementation=implementation)
    compute = torch.float64 if aligned.dtype == torch.float64 else torch.float32
    assert {statistic.dtype for statistic in result[:4]} == {compute}
    assert {statistic.dtype for statistic in result[4:]} == {torch.int64}
    width = aligned.shape[-1]
    columns = [statistic.reshape(-1).tolist() for statistic in result]
    finite = aligned[torch.isfinite(aligned)]
    tolerance = 16 * torch.finfo(compute).eps * (1.0 + (float(finite.abs().max()) if finite.numel() else 0.0))
    for n, (a, b) in enumerate(zip(aligned.reshape(-1, width), base.reshape(-1, width), strict=True)):
        row = divergence_row(a, b, top_n, width if vocab_size is None else vocab_size)
        expected = (row.kl, row.reverse_kl, row.jsd, row.top_overlap)
        actual = tuple(column[n] for column in columns[:4])
        assert actual == pytest.approx(expected, rel=2e-5, abs=tolerance, nan_ok=True)
        assert row.count_bounds[0] <= columns[4][n] <= row.count_bounds[1]
        assert row.favored_in_top_bounds[0] <= columns[5][n] <= row.favored_in_top_bounds[1]
    return result


@pytest.mark.parametrize(
    ("implementation", "rows", "vocab", "dtype", "peaked"),
    [(name, *size) for name in RUNNABLE for size in SIZES if takes(name, size[2])],
    ids=str,
)
def test_divergence_against_float64(
    implementation: str, rows: int, vocab: int, dtype: torch.dtype, peaked: bool
) -> None:
    _, aligned, base = three_models(rows, vocab, dtype=dtype, peaked=peaked, seed=vocab)
    result = check_divergence(aligned, base, top_n=min(100, vocab), implementation=implementation)
    assert bool(((result.top_overlap >= 0) & (result.top_overlap <= 1)).all())
    assert bool(((result.jsd >= 0) & (result.jsd <= math.log(2) * (1 + 1e-6))).all())


@each_implementation
def test_error_is_no_larger_than_eagers(implementation: str) -> None:
    _, aligned, base = three_models(8, 4096)
    result = position_divergence(aligned, base, implementation=implementation)
    log_p, log_q = aligned.log_softmax(-1), base.log_softmax(-1)
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    eager = (
        (log_p.exp() * (log_p - log_q)).sum(-1),
        (log_q.exp() * (log_q - log_p)).sum(-1),
        0.5 * (log_p.exp() * (log_p - middle) + log_q.exp() * (log_q - middle)).sum(-1),
    )
    rows = [divergence_row(a, b, 100, 4096) for a, b in zip(aligned, base, strict=True)]
    for name, naive in zip(("kl", "reverse_kl", "jsd"), eager, strict=True):
        expected = torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64)
        error, eager_error = (
            float((value.double() - expected).abs().max()) for value in (getattr(result, name), naive)
        )
        assert error <= eager_error + 4 * torch.finfo(torch.float32).eps * float(expected.max())


@each_implementation
def test_jsd_keeps_its_digits_where_models_nearly_agree(implementation: str) -> None:
    """About 1e-8 here: log 2 - softplus would leave only noise of that size."""
    _, aligned, _ = three_models(4, 500)
    base = aligned + 3e-4 * torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    result = position_divergence(aligned, base, implementation=implementation)
    for n in range(4):
        expected = divergence_row(aligned[n], base[n], 100, 500).jsd
        assert 0 < expected < 1e-7
        assert float(result.jsd[n]) == pytest.approx(expected, rel=0.05)


@each_implementation
def test_models_apart_by_far_reach_log_2(implementation: str) -> None:
    aligned, base = torch.full((1, 50), -1e4), torch.full((1, 50), -1e4)
    aligned[0, 3], base[0, 4] = 1e4, 1e4
    result = check_divergence(aligned, base, top_n=1, implementation=implementation)
    assert float(result.jsd) == pytest.approx(math.log(2), rel=1e-6)
    assert float(result.kl) == pytest.approx(2e4)
    assert float(result.top_overlap) == 0.0


@each_implementation
def test_equal_models(implementation: str) -> None:
    aligned = three_models(5, 1000)[1]
    result = position_divergence(aligned, aligned.t().contiguous().t(), implementation=implementation)
    for name in ("kl", "reverse_kl", "jsd", "favored_count", "favored_in_top"):
        assert getattr(result, name).tolist() == [0] * 5, name
    assert result.top_overlap.tolist() == [1.0] * 5


@each_implementation
def test_kl_directions_swap_with_the_models(implementation: str) -> None:
    _, aligned, base = three_models(3, 300)
    here = position_divergence(aligned, base, implementation=implementation)
    there = position_divergence(base, aligned, implementation=implementation)
    torch.testing.assert_close(here.kl, there.reverse_kl)
    torch.testing.assert_close(here.jsd, there.jsd)
    assert torch.equal(here.top_overlap, there.top_overlap)
    assert not torch.allclose(here.kl, here.reverse_kl)


@each_implementation
def test_top_sets_break_ties_to_the_lowest_index(implementation: str) -> None:
    aligned = torch.zeros(1, 10)
    base = torch.tensor([[-0.0, 0, 0, 0, -1, -1, -1, 5, 0, 0]])
    result = position_divergence(aligned, base, top_n=4, implementation=implementation)
    # aligned's top: 0 1 2 3; base's: 7 0 1 2
    assert float(result.top_overlap) == 0.75
    assert (int(result.favored_count), int(result.favored_in_top)) == (1, 0)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("where", [0, 1])
@each_implementation
def test_exceptional_rows_and_padding(implementation: str, where: int, value: float) -> None:
    models = three_models(2, 2, 40)[1:]
    for model in models:
        model[0, 1, 3:9] = -INF  # absent
        model[1, 1, 4:36] = -INF  # four present, fewer than top_n
        model[..., 36:] = NAN  # beyond vocab_size
    models[where][1, 0, 12] = value  # bad
    result = check_divergence(*models, top_n=6, vocab_size=36, implementation=implementation)
    assert bool(result.jsd[1, 0].isnan())
    assert bool(torch.isfinite(result.jsd[[0, 0, 1], [0, 1, 1]]).all())
    favored = base_favored_tokens(*models, top_k=6, vocab_size=36, implementation=implementation)
    assert favored.indices[1, 0].tolist() == [-1] * 6
    assert bool(favored.differences[1, 0].isnan().all())
    assert int(favored.count[1, 0]) == 0
    assert sorted(favored.indices[1, 1, :4].tolist()) == [0, 1, 2, 3]
    assert favored.indices[1, 1, 4:].tolist() == [-1, -1]
    assert favored.differences[1, 1, 4:].tolist() == [-INF, -INF]
    for row in ((0, 0), (0, 1)):
        a, b = (model[row][:36] for model in models)
        expected = descending(difference_in_compute_dtype(b, a), present_entries([a, b]), 6)
        assert favored.indices[row].tolist() == expected


@pytest.mark.parametrize(
    ("implementation", "dtype"), [(name, dtype) for name in RUNNABLE for dtype in DTYPES if takes(name, dtype)], ids=str
)
@pytest.mark.parametrize(("rows", "vocab", "k"), [(0, 5, 2), (3, 1, 1), (3, 7, 7), (3, 4096, 100)])
def test_base_favored_tokens(implementation: str, rows: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    _, aligned, base = three_models(rows, vocab, dtype=dtype)
    result = base_favored_tokens(aligned, base, top_k=k, implementation=implementation)
    assert (result.indices.shape, result.differences.shape, result.count.shape) == ((rows, k), (rows, k), (rows,))
    assert (result.indices.dtype, result.count.dtype) == (torch.int64, torch.int64)
    assert result.differences.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for n in range(rows):
        difference = difference_in_compute_dtype(base[n], aligned[n])
        expected = descending(difference, list(range(vocab)), k)
        assert result.indices[n].tolist() == expected
        assert result.differences[n].tolist() == difference[expected].tolist()
        low, high = favored_bounds(difference, aligned[n].double(), base[n].double())
        assert low <= int(result.count[n]) <= high


@pytest.mark.parametrize("shape", [(0, 9), (9,)], ids=str)
@each_implementation
def test_no_rows_and_a_single_row(implementation: str, shape: tuple[int, ...]) -> None:
    _, aligned, base = three_models(*shape)
    result = check_divergence(aligned, base, top_n=4, implementation=implementation)
    assert {statistic.shape for statistic in result} == {shape[:-1]}


@each_implementation
def test_carries_no_gradient(implementation: str) -> None:
    _, aligned, base = (model.requires_grad_() for model in three_models(2, 30))
    for result in (
        position_divergence(aligned, base, top_n=5, implementation=implementation),
        base_favored_tokens(aligned, base, top_k=5, implementation=implementation),
    ):
        assert not any(statistic.requires_grad for statistic in result)


@pytest.mark.parametrize("top", [0, 31, 2.0, True], ids=str)
@each_implementation
def test_refuses_an_impossible_top(implementation: str, top: object) -> None:
    _, aligned, base = three_models(2, 40)
    error = ValueError if type(top) is int else TypeError
    with pytest.raises(error, match="top_n is"):
        position_divergence(aligned, base, top_n=top, vocab_size=30, implementation=implementation)
    with pytest.raises(error, match="top_k is"):
        base_favored_tokens(aligned, base, top_k=top, vocab_size=30, implementation=implementation)

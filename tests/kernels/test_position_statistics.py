"""All statistics of a row from one op on the CPU, and from several elsewhere: the same numbers."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.position_divergence import base_favored_tokens, position_divergence, position_statistics
from tests.kernels.loss_helpers import needs_native
from tests.kernels.samples import three_models

NATIVE = pytest.param("cpu", marks=needs_native, id="native")
NAN, INF = math.nan, math.inf


def two_models(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    return three_models(*shape, dtype=dtype, seed=seed)[1:]


def in_base_top(aligned: Tensor, base: Tensor, top_n: int) -> tuple[Tensor, Tensor]:
    """The least and the most there may be: entries whose difference is the threshold, to rounding, may count or not."""
    a, b = aligned.double(), base.double()
    threshold = b.logsumexp(-1, keepdim=True) - a.logsumexp(-1, keepdim=True)
    slack = 4e-6 * (1 + torch.maximum(a.abs(), b.abs()).amax(-1, keepdim=True))
    top = (b + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :top_n]
    difference = (base.float() - aligned.float()).double().gather(-1, top)
    return (difference > threshold + slack).sum(-1), (difference > threshold - slack).sum(-1)


def check(aligned: Tensor, base: Tensor, top_n: int, top_k: int, implementation: str) -> None:
    found = position_statistics(aligned, base, top_n=top_n, top_k=top_k, implementation=implementation)
    divergence = position_divergence(aligned, base, top_n=top_n, implementation=implementation)
    for ours, theirs in zip(found, divergence, strict=False):
        assert torch.equal(ours, theirs), "one pass or two, the same sums"
    tokens = base_favored_tokens(aligned, base, top_k=top_k, implementation=implementation).indices
    assert torch.equal(found.favored_tokens, tokens)
    least, most = in_base_top(aligned, base, top_n)
    assert bool(((least <= found.favored_in_base_top) & (found.favored_in_base_top <= most)).all())


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
@pytest.mark.parametrize("vocab", [1, 2, 7, 31, 32, 33, 100, 129, 4097, 32000])
def test_every_width(vocab: int, implementation: str) -> None:
    for dtype, (top_n, top_k) in itertools.product(COMPILED_DTYPES, ((1, 1), (5, 3), (3, 50), (100, 100))):
        check(*two_models(3, vocab, dtype=dtype), min(top_n, vocab), min(top_k, vocab), implementation)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_threads_and_strides_change_nothing(threads: int) -> None:
    aligned, base = two_models(4, 9000)
    before = torch.get_num_threads()
    expected = position_statistics(aligned, base, top_n=50, top_k=60, implementation="cpu")
    try:
        torch.set_num_threads(threads)
        for rows in (1, 4):
            wide = [torch.cat([model, model], dim=1)[:rows, :9000] for model in (aligned, base)]
            found = position_statistics(*wide, top_n=50, top_k=60, implementation="cpu")
            assert all(torch.equal(ours, theirs[:rows]) for ours, theirs in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
def test_ties_equal_models_and_shifts(implementation: str) -> None:
    aligned, _ = two_models(2, 500)
    rounded = (aligned * 2).round()
    check(rounded, rounded.flip(-1).contiguous(), 40, 40, implementation)
    for other in (aligned, torch.zeros_like(aligned)):
        equal = position_statistics(other, other, top_n=40, top_k=40, implementation=implementation)
        assert equal.favored_in_base_top.tolist() == [0, 0]
    shifted = position_statistics(rounded, rounded + 3, top_n=40, top_k=40, implementation=implementation)
    assert shifted.favored_in_base_top.tolist() == [0, 0]


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
def test_rows_with_absent_entries_extreme_and_bad_ones(implementation: str) -> None:
    aligned, base = two_models(6, 300)
    aligned[0, 7] = base[0, 7] = -INF  # absent
    aligned[1] = base[1] = -INF
    aligned[1, :3] = base[1, :3] = torch.tensor([1.0, 0.0, -1.0])
    base[1, 2] = 3.0  # three entries, and the third is base-favored
    aligned[2] *= 1e30
    base[2] *= 1e30
    aligned[3, 5], base[4, 5], aligned[5, 9] = NAN, INF, -INF
    found = position_statistics(aligned, base, top_n=20, top_k=20, implementation=implementation)
    alone = [position_statistics(aligned[i : i + 1], base[i : i + 1], top_n=20, top_k=20) for i in range(3)]
    for row, expected in enumerate(alone):
        assert found.favored_in_base_top[row] == expected.favored_in_base_top[0]
        assert torch.equal(found.favored_tokens[row], expected.favored_tokens[0])
    assert found.favored_in_base_top[1] == 1
    assert found.favored_tokens[1].tolist() == [2, 0, 1] + [-1] * 17
    assert 7 not in found.favored_tokens[0]
    assert found.kl[3:].isnan().all()
    assert found.favored_in_base_top[3:].tolist() == found.favored_in_top[3:].tolist() == [0, 0, 0]
    assert (found.favored_tokens[3:] == -1).all()


@needs_native
def test_opcheck() -> None:
    for dtype in COMPILED_DTYPES:
        arguments = (*two_models(2, 37, dtype=dtype), 5, 3, 37)
        torch.library.opcheck(torch.ops.deepalign.position_statistics.default, arguments)


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
def test_bad_calls_are_refused(implementation: str) -> None:
    aligned, base = two_models(2, 37)
    for bad, name in (
        ({"top_n": 38}, "top_n"),
        ({"top_k": 38, "top_n": 3}, "top_k"),
        ({"top_k": 0, "top_n": 3}, "top_k"),
    ):
        with pytest.raises(ValueError, match=name):
            position_statistics(aligned, base, **bad, implementation=implementation)
    with pytest.raises(ValueError, match="shape"):
        position_statistics(aligned, base[:1], top_n=3, top_k=3, implementation=implementation)


@needs_native
def test_the_native_op_refuses_what_would_read_out_of_bounds() -> None:
    aligned, base = two_models(2, 37)
    for arguments in (
        (aligned, base, 38, 3, 37),
        (aligned, base, 3, 38, 37),
        (aligned, base, 3, 3, 38),
        (aligned, base[:1], 3, 3, 37),
    ):
        with pytest.raises(RuntimeError, match="deepalign"):
            torch.ops.deepalign.position_statistics(*arguments)

"""Products with a float32 result: every route against float64, on matrices of every layout."""

import math

import pytest
import torch
from torch import Tensor

from deepalign.kernels import products
from deepalign.kernels.library import WHY_NO_NATIVE
from deepalign.kernels.products import product_, product_route

CPU = torch.device("cpu")
# rows, depth, columns around the tiles (8 x 48), the vector's pairs (32) and the block of the depth (512)
SHAPES = [(1, 1, 1), (3, 5, 7), (8, 32, 48), (17, 33, 50), (130, 1030, 97), (9, 513, 800), (65, 2, 49), (2, 64, 431)]
needs_bf16 = pytest.mark.skipif(product_route(CPU, torch.bfloat16) != "native_bf16", reason="needs AVX-512 BF16")


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if layout == "transposed":
        return torch.randn(columns, rows, generator=generator).to(dtype).t()
    wide = torch.randn(rows + 3, columns + 5, generator=generator).to(dtype)
    return wide[1 : rows + 1, 2 : columns + 2] if layout == "part" else wide[:rows, :columns].contiguous()


@pytest.mark.parametrize("route", ["chosen", "blocks"])
@pytest.mark.parametrize("left_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products(dtype: torch.dtype, left_dtype: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if route == "blocks":
        monkeypatch.setattr(products, "product_route", lambda *_: "blocks")
        monkeypatch.setattr(products, "BLOCK_ELEMENTS", 3000)
    in_two_terms = product_route(CPU, dtype) == "native_bf16" and route == "chosen" and left_dtype == "float32"
    for seed, (rows, depth, columns) in enumerate(SHAPES):
        for left_layout in ("plain", "transposed", "part"):
            for right_layout in ("plain", "transposed", "part"):
                left = matrix(rows, depth, left_layout, dtype if left_dtype == "same" else torch.float32, seed)
                right = matrix(depth, columns, right_layout, dtype, seed + 100)
                expected, scale = left.double() @ right.double(), 5e-7 * depth + 1e-6
                scale += 4e-5 * depth**0.5 if in_two_terms else 0.0  # the second term has 8 bits, too
                out = torch.full((rows + 1, columns + 2), math.nan)
                product_(left, right, out[:rows, :columns])
                assert float((out[:rows, :columns] - expected).abs().max()) <= scale
                assert bool(out[rows:].isnan().all())
                assert bool(out[:, columns:].isnan().all())
                product_(left, right, out[:rows, :columns], accumulate=True)
                assert float((out[:rows, :columns] - 2 * expected).abs().max()) <= 4 * scale


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2])
def test_a_result_larger_than_the_caches_is_that_of_its_parts(threads: int) -> None:
    """Beyond 16 MiB whole cache lines are written past the caches, where they are aligned."""
    rows, depth, columns = 42, 6, 100003
    left = matrix(rows, depth, "plain", torch.bfloat16, 0)
    right = matrix(depth, columns, "transposed", torch.bfloat16, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        wide = torch.full((rows + 1, columns + 13), math.nan)
        shifted = torch.full((rows + 1, columns + 13), math.nan)
        product_(left, right, wide[:rows, :columns])
        product_(left, right, shifted[:rows, 3 : columns + 3])
        half = torch.empty(rows, 50016)
        product_(left, right[:, :50016], half)
    finally:
        torch.set_num_threads(before)
    assert wide.data_ptr() % 64 == 0
    assert wide.stride(0) % 16 == 0
    assert torch.equal(wide[:rows, :columns], shifted[:rows, 3 : columns + 3])
    assert torch.equal(wide[:rows, :50016], half)
    assert float((half - left.float() @ right[:, :50016].float()).abs().max()) < 1e-5
    assert bool(wide[rows:].isnan().all())
    assert bool(wide[:, columns:].isnan().all())


def test_float64_stays_float64() -> None:
    left, right = matrix(5, 70, "plain", torch.float64, 0), matrix(70, 6, "transposed", torch.float64, 1)
    out = torch.empty(5, 6, dtype=torch.float64)
    product_(left, right, out)
    torch.testing.assert_close(out, left @ right, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_empty_products(dtype: torch.dtype) -> None:
    out = torch.ones(2, 3)
    product_(torch.empty(2, 0, dtype=dtype), torch.empty(0, 3, dtype=dtype), out, accumulate=True)
    assert bool((out == 1).all())
    product_(torch.empty(2, 0, dtype=dtype), torch.empty(0, 3, dtype=dtype), out)
    assert not bool(out.any())
    product_(torch.empty(0, 4, dtype=dtype), torch.empty(4, 3, dtype=dtype), torch.empty(0, 3))


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


@needs_bf16
@pytest.mark.parametrize("peak", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("spread", [0.0, 1.5, 4.0])
def test_second_terms_are_dropped_where_they_do_not_matter(spread: float, peak: float) -> None:
    """Of lognormal gradients: the error is an eighth of rounding's at most, and less is multiplied where rows peak."""
    gradient = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)).mul(spread).exp() * peak
    gradient[7] = 0.0
    gradient[5] *= 1e-6
    levels = products.row_levels(gradient, torch.bfloat16)
    assert levels is not None
    below = torch.where(gradient < levels[:, None], gradient / peak, 0.0).square().sum(-1)
    assert bool((below <= (gradient / peak).square().sum(-1) / 63).all())
    kept = float((gradient >= levels[:, None])[8:].float().mean())
    assert kept <= {0.0: 1.0, 1.5: 0.5, 4.0: 0.02}[spread]
    for left, right in (
        (gradient, matrix(3000, 50, "plain", torch.bfloat16, 1)),
        (gradient.t(), matrix(40, 50, "plain", torch.bfloat16, 1)),
    ):
        exact, out = left.double() @ right.double(), torch.empty(left.shape[0], 50)
        rounded = rms(left.bfloat16().double() @ right.double() - exact)
        product_(left, right, out, levels=levels)
        assert rms(out - exact) <= 0.15 * rounded + 1e-6 * rms(exact)
        product_(left, right, out)
        assert rms(out - exact) <= 0.01 * rounded + 1e-6 * rms(exact)


@needs_bf16
def test_a_row_does_not_depend_on_the_others_or_on_threads() -> None:
    left, right = matrix(100, 700, "plain", torch.bfloat16, 0), matrix(700, 500, "transposed", torch.bfloat16, 1)
    wide = matrix(100, 700, "plain", torch.float32, 2).mul(3.0).exp()
    levels = products.row_levels(wide, torch.bfloat16)
    assert levels is not None
    whole, whole_wide = torch.empty(100, 500), torch.empty(100, 500)
    product_(left, right, whole)
    product_(wide, right, whole_wide, levels=levels)
    for first, last in ((0, 1), (5, 23), (99, 100)):
        part = torch.empty(last - first, 500)
        product_(left[first:last], right, part)
        assert torch.equal(part, whole[first:last])
        product_(wide[first:last], right, part, levels=levels[first:last])
        assert torch.equal(part, whole_wide[first:last])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = torch.empty(100, 500)
    product_(left, right, alone)
    torch.set_num_threads(threads)
    assert torch.equal(alone, whole)


@needs_bf16
def test_nan_and_infinity_stay_in_their_row() -> None:
    left, right = matrix(20, 600, "plain", torch.bfloat16, 0), matrix(600, 60, "plain", torch.bfloat16, 1)
    left[3, 5], left[11, 599] = math.nan, math.inf
    out = torch.empty(20, 60)
    product_(left, right, out)
    assert bool(out[3].isnan().all())
    assert bool((~torch.isfinite(out[11])).all())
    assert bool(torch.isfinite(out[[row for row in range(20) if row not in (3, 11)]]).all())


@needs_bf16
def test_the_op_refuses_what_does_not_fit() -> None:
    op = torch.ops.deepalign.gemm_bf16_
    left, right, out = torch.zeros(2, 4), torch.zeros(4, 6, dtype=torch.bfloat16), torch.zeros(2, 6)
    for bad in (
        (left[:, :3], right, out),
        (left, right, out[:1]),
        (left, right.float(), out),
        (left, right, out.bfloat16()),
        (left.half(), right, out),
        (left[:, ::2], right[:2], out),
        (left, right, torch.zeros(6, 2).t()),
    ):
        with pytest.raises(RuntimeError, match="deepalign: "):
            op(*bad, False)
    for levels in (torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="deepalign: levels"):
            op(left, right, out, False, levels)
    with pytest.raises(RuntimeError, match="deepalign: levels"):
        op(left.bfloat16(), right, out, False, torch.zeros(2))
    for bad in (left.t(), left.double(), left[0]):
        with pytest.raises(RuntimeError, match="deepalign: "):
            torch.ops.deepalign.row_levels(bad)


@pytest.mark.skipif(WHY_NO_NATIVE is not None, reason=str(WHY_NO_NATIVE))
def test_the_op_has_a_schema_and_a_fake_kernel() -> None:
    if not torch.ops.deepalign.has_gemm_bf16():
        pytest.skip("needs AVX-512 BF16")
    arguments = (torch.randn(3, 8), torch.randn(8, 5).bfloat16(), torch.zeros(3, 5), True)
    torch.library.opcheck(torch.ops.deepalign.gemm_bf16_.default, arguments)
    torch.library.opcheck(torch.ops.deepalign.gemm_bf16_.default, (*arguments, torch.zeros(3)))
    torch.library.opcheck(torch.ops.deepalign.row_levels.default, (torch.randn(3, 8),))


def test_the_route_is_named() -> None:
    assert product_route(CPU, torch.float32) == product_route(CPU, torch.float64) == "torch"
    assert product_route(CPU, torch.float16) == "blocks"
    assert product_route(CPU, torch.bfloat16) in ("native_bf16", "blocks")
    assert product_route(torch.device("cuda"), torch.bfloat16) == "out_dtype"

"""The position statistics' Triton kernels against float64, in the interpreter: what the other implementations are held
to."""

import math

import pytest
import torch

from deepalign import CompletionLossConfig, contrastive_sample, fused_completion_loss
from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.position_divergence import base_favored_tokens, position_divergence
from tests.kernels import test_position_divergence as shared
from tests.kernels.samples import three_models
from tests.triton import interpreted  # noqa: F401  (puts "interpreted" into the table)
from tests.triton.interpreted import sizes

SHARED = (
    shared.test_jsd_keeps_its_digits_where_models_nearly_agree,
    shared.test_models_apart_by_far_reach_log_2,
    shared.test_equal_models,
    shared.test_kl_directions_swap_with_the_models,
    shared.test_top_sets_break_ties_to_the_lowest_index,
    shared.test_carries_no_gradient,
)


@pytest.mark.parametrize("test", SHARED, ids=lambda test: test.__name__)
def test_as_any_implementation(test: object) -> None:
    test("interpreted")


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 128, 2001])
def test_divergence_against_float64(vocab: int, dtype: torch.dtype) -> None:
    shared.test_divergence_against_float64("interpreted", 3, vocab, dtype, vocab % 2 == 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", [0, 1])
def test_exceptional_rows_and_padding(where: int, value: float) -> None:
    shared.test_exceptional_rows_and_padding("interpreted", where, value)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab", "k"), [(0, 5, 2), (3, 1, 1), (3, 7, 7), (1, 1300, 60)])
def test_base_favored_tokens(rows: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    with sizes("completion_loss", block=512, share=1000, programs=1):
        shared.test_base_favored_tokens("interpreted", rows, vocab, k, dtype)


def test_no_entry_is_favored_where_all_are_shifted_alike() -> None:
    aligned = (torch.randn(8, 1100, generator=torch.Generator().manual_seed(3)) * 8).round() / 2
    output = position_divergence(aligned, aligned + 0.5, top_n=5, implementation="interpreted")
    assert output.favored_count.tolist() == output.favored_in_top.tolist() == [0] * 8


@pytest.mark.parametrize("shape", [(0, 9), (9,)], ids=str)
def test_no_rows_and_a_single_row(shape: tuple[int, ...]) -> None:
    shared.test_no_rows_and_a_single_row("interpreted", shape)


def test_more_than_a_program_lists() -> None:
    _, aligned, base = three_models(2, 1100, dtype=torch.bfloat16)
    aligned[1, 50:] = base[1, 50:] = -math.inf
    for operation, top in ((position_divergence, {"top_n": 1030}), (base_favored_tokens, {"top_k": 1030})):
        for found, expected in zip(
            operation(aligned, base, implementation="interpreted", **top),
            operation(aligned, base, implementation="reference", **top),
            strict=True,
        ):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_torchs_default_dtype_changes_nothing(default: torch.dtype) -> None:
    student, aligned, base = three_models(2, 40)

    def run() -> list[torch.Tensor]:
        options = {"implementation": "interpreted"}
        found = fused_completion_loss(student, aligned, base, config=CompletionLossConfig(top_k=3), **options)
        favored = base_favored_tokens(aligned, base, top_k=3, **options)
        uniforms = torch.tensor([0.2, 0.7], dtype=torch.float32)
        drawn = contrastive_sample(aligned, base, alpha=0.5, top_p=0.9, uniforms=uniforms, **options)
        return [*found, *favored, *position_divergence(aligned, base, top_n=3, **options), *drawn]

    expected = run()
    torch.set_default_dtype(default)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)

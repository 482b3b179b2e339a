"""Exceptional rows in the CPU kernels of the completion loss: bad, absent, extreme, not read."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.completion_loss import CompletionLossConfig, fused_completion_loss
from tests.kernels.loss_helpers import (
    check_against_oracle,
    check_against_wide_rows,
    loss_and_gradient,
    needs_native,
    wide_divergence,
)
from tests.kernels.samples import three_models

pytestmark = needs_native
NAN, INF = math.nan, math.inf
OPTIONS = {"config": CompletionLossConfig(top_k=5, lambda_reg=0.01), "implementation": "cpu", "reduction": "none"}
KINDS = [
    {"kl_direction": direction, "favored_from": favored_from, "penalty": penalty}
    for direction, favored_from, penalty in itertools.product(
        ("student_teacher", "teacher_student"), ("aligned", "student"), ("square", "centered_square")
    )
]


def assert_row_is_bad(output: tuple[Tensor, ...], gradient: Tensor, row: int, vocab: int) -> None:
    loss, kl, completion, alpha, count, indices = (statistic[row] for statistic in output)
    assert all(bool(value.isnan()) for value in (loss, kl, completion, alpha))
    assert int(count) == 0
    assert bool((indices == -1).all())
    assert bool(gradient[row, :vocab].isnan().all())
    assert not bool(gradient[row, vocab:].any())


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("model", [0, 1, 2], ids=["student", "aligned", "base"])
def test_a_bad_entry_anywhere_spoils_its_row_alone(model: int, value: float, dtype: torch.dtype) -> None:
    for width, vocab in ((9, 9), (77, 70), (1100, 1099)):
        models = three_models(3, width, dtype=dtype)
        clean, clean_gradient = loss_and_gradient(*models, vocab_size=vocab, **OPTIONS)
        others = torch.tensor([0, 2])
        for position, inplace in itertools.product((0, vocab // 2, vocab - 1), (False, True)):
            spoiled = [tensor.clone() for tensor in models]
            spoiled[model][1, position] = value
            output, gradient = loss_and_gradient(*spoiled, vocab_size=vocab, inplace=inplace, **OPTIONS)
            assert_row_is_bad(output, gradient, 1, vocab)
            for left, right in zip((*output, gradient), (*clean, clean_gradient), strict=True):
                assert torch.equal(left[others], right[others])


@pytest.mark.parametrize("models", [(0, 1), (0, 2), (1, 2)])
def test_minus_infinity_in_two_models_is_bad(models: tuple[int, int]) -> None:
    for position in (0, 40, 98):
        logits = three_models(2, 99)
        for model in models:
            logits[model][0, position] = -INF
        output, gradient = loss_and_gradient(*logits, **OPTIONS)
        assert_row_is_bad(output, gradient, 0, 99)
        assert bool(torch.isfinite(gradient[1]).all())


ABSENT = {
    "the first entries": slice(0, 64),
    "the first of all": slice(0, 1),
    "the end of a partial step": slice(1090, 1099),
    "a whole block and more": slice(300, 1050),
    "all but three": slice(3, 1099),
    "every second": slice(0, 1099, 2),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("absent", ABSENT.values(), ids=ABSENT)
def test_absent_entries(absent: slice, kind: dict[str, str]) -> None:
    models = three_models(2, 1099, dtype=torch.bfloat16)
    for model in models:
        model[0, absent] = -INF
    options = {**OPTIONS, "config": CompletionLossConfig(top_k=5, lambda_reg=0.01, **kind)}
    output, gradient = check_against_oracle(*models, **options)
    assert not bool(gradient[0, absent].any())
    kept = torch.isfinite(models[0][0])
    options["config"] = replace(options["config"], top_k=min(5, int(kept.sum())))
    dense, dense_gradient = loss_and_gradient(*(model[:1, kept] for model in models), **options)
    for name in ("loss", "kl", "completion", "alpha"):
        torch.testing.assert_close(getattr(output, name)[:1], getattr(dense, name))
    assert torch.equal(output.base_favored_count[:1], dense.base_favored_count)
    torch.testing.assert_close(gradient[:1, kept], dense_gradient, rtol=8e-3, atol=1e-7)


def test_given_entries_that_are_absent_do_not_count() -> None:
    models = three_models(2, 99)
    for model in models:
        model[0, 6] = -INF
    given = torch.tensor([[6, 98, 98, -1, 6, 0], [6, 6, -1, -1, -1, -1]])
    output, _ = check_against_oracle(*models, top_k_indices=given, **OPTIONS)
    expected = 0.01 * models[0][[0, 1], [98, 6]].square() + torch.tensor([0.01 * models[0][0, 0] ** 2, 0.0])
    torch.testing.assert_close(output.completion, expected)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
def test_logits_of_ten_thousand(kind: dict[str, str], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    models = [(1e4 * (2 * torch.rand(3, 333, generator=generator) - 1)).to(dtype) for _ in range(3)]
    options = {**OPTIONS, "config": CompletionLossConfig(top_k=5, lambda_reg=1e-6, **kind)}
    # the teacher is rounded to a float, whose last place at 1e4 is 1e-3
    _, gradient = check_against_oracle(*models, gradient_rounding=5e-4, **options)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("shift", [-15.0, 100.0, -3000.0, 9000.0])
def test_shifted_rows(shift: float) -> None:
    """Offsets guessed from the first entries, and those far above or below them."""
    models = [model + shift for model in three_models(2, 700)]
    models[0][0, :64] -= 200.0
    models[1][1, 650] += 300.0
    # half of it, where the teacher is rounded
    last_place = 2.0**-24 * max(float(model.abs().max()) for model in models)
    config = CompletionLossConfig(top_k=5, lambda_reg=1e-6)
    check_against_wide_rows(*models, config, tolerance=2e-5, gradient_rounding=last_place)


@pytest.mark.parametrize("position", [0, 500, 998])
@pytest.mark.parametrize("model", [0, 1, 2], ids=["student", "aligned", "base"])
@pytest.mark.parametrize("value", [-1e30, -1e19, -3e5])
def test_one_very_low_logit(value: float, model: int, position: int) -> None:
    models = three_models(2, 999)
    models[model][0, position] = value
    config = CompletionLossConfig(top_k=5, lambda_reg=1e-30, teacher_mix=0.7)
    output, gradient = loss_and_gradient(*models, **{**OPTIONS, "config": config})
    teacher = 0.7 * models[1].double() + 0.3 * models[2].double()
    kl, kl_gradient = wide_divergence(models[0].double(), teacher, config)
    torch.testing.assert_close(output.kl.double(), kl, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient.double(), kl_gradient, rtol=2e-5, atol=2e-6 + 2e-7 * float(kl_gradient.abs().max())
    )
    if model == 1:  # the base model exceeds the aligned one most where that is very low
        assert int(output.top_k_indices[0, 0]) == position


@pytest.mark.parametrize("teacher_mix", [1.2, 0.5])
@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
def test_single_entries_beyond_an_exponentials_range(dtype: torch.dtype, teacher_mix: float) -> None:
    """In the middle of rows whose other entries are ordinary; with 1.2, base at -5000 puts the teacher at 1000."""
    for model, value in ((0, -400.0), (1, -250.0), (2, -5000.0), (0, 150.0)):
        models = three_models(2, 999, dtype=dtype)
        models[model][0, 510] = value
        config = CompletionLossConfig(top_k=5, lambda_reg=1e-6, teacher_mix=teacher_mix)
        check_against_wide_rows(*models, config, gradient_rounding=2.0**-16)


@pytest.mark.parametrize("vocab", [65, 1001])
def test_logits_near_the_largest_float(vocab: int) -> None:
    """One entry holds all the mass of every model: no divergence, no gradient, whatever the size of the logits."""
    for position in (0, vocab // 2, vocab - 1):
        models = three_models(2, vocab)
        for model in models:
            model[0, position] = 3e38
        weight = torch.zeros(2)
        output, gradient = loss_and_gradient(*models, completion_weight=weight, **OPTIONS)
        assert float(output.kl[0]) == 0.0
        assert not bool(gradient[0].any())
        assert bool(output.completion[0].isinf()) == (position in output.top_k_indices[0])
        assert bool(torch.isfinite(output.loss).all())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_differences_that_overflow_disturb_no_other_row(kind: dict[str, str], dtype: torch.dtype) -> None:
    options = {**OPTIONS, "config": CompletionLossConfig(top_k=5, **kind)}
    models = three_models(3, 777, dtype=dtype)
    clean, clean_gradient = loss_and_gradient(*models, **options)
    for signs in itertools.product((3e38, -3e38), repeat=3):
        for position in (0, 776):
            for model, value in zip(models, signs, strict=True):
                model[1, position] = value
            output, gradient = loss_and_gradient(*models, **options)
            for left, right in zip((*output, gradient), (*clean, clean_gradient), strict=True):
                assert torch.equal(left[[0, 2]], right[[0, 2]])
            indices = output.top_k_indices[1]
            assert bool(((indices >= -1) & (indices < 777)).all())
            assert 0 <= int(output.base_favored_count[1]) <= 777


@pytest.mark.parametrize("value", [0.25, NAN, -INF], ids=str)
def test_rows_of_two_zero_weights_are_not_read(value: float) -> None:
    models = three_models(3, 130, dtype=torch.float16)
    for model in models:
        model[:] = value
    output, gradient = loss_and_gradient(
        *models, kl_weight=torch.zeros(3), completion_weight=torch.zeros(3), inplace=True, **OPTIONS
    )
    assert not any(bool(statistic.any()) for statistic in output[:5])
    assert bool((output.top_k_indices == -1).all())
    assert not bool(gradient.any())


@pytest.mark.parametrize("term", ["kl_weight", "completion_weight"])
def test_a_term_without_weight_leaves_loss_and_gradient(term: str) -> None:
    models = three_models(2, 130)
    both, both_gradient = loss_and_gradient(*models, **OPTIONS)
    one, one_gradient = loss_and_gradient(*models, **{term: torch.zeros(2)}, **OPTIONS)
    kl, penalty = both.kl, both.alpha * both.completion
    torch.testing.assert_close(one.loss.detach(), penalty if term == "kl_weight" else kl)
    other = "completion_weight" if term == "kl_weight" else "kl_weight"
    _, other_gradient = loss_and_gradient(*models, **{other: torch.zeros(2)}, **OPTIONS)
    torch.testing.assert_close(one_gradient + other_gradient, both_gradient)
    for name in ("kl", "completion", "alpha", "base_favored_count", "top_k_indices"):
        assert torch.equal(getattr(one, name), getattr(both, name))


def test_no_rows() -> None:
    empty = torch.zeros(0, 500)
    output = fused_completion_loss(empty, empty, empty, implementation="cpu", reduction="none")
    assert [tuple(statistic.shape) for statistic in output] == [(0,)] * 5 + [(0, 100)]

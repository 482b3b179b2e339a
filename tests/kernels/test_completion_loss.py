"""Every implementation of the completion loss against float64: sizes, dtypes, options, exceptional rows."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from deepalign.kernels.completion_loss import CompletionLossConfig, fused_completion_loss
from tests.kernels.loss_helpers import (
    DTYPES_OF,
    RUNNABLE,
    check_against_oracle,
    every_implementation,
    loss_and_gradient,
    oracle_rows,
)
from tests.kernels.samples import SIZES, pairwise, three_models

NAN, INF = math.nan, math.inf


def config(**changes: object) -> CompletionLossConfig:
    # a larger lambda_reg than the default: its gradient must not hide below that of the distillation
    return CompletionLossConfig(**{"top_k": 5, "lambda_reg": 0.05, **changes})


def eager(student: Tensor, aligned: Tensor, base: Tensor, cfg: CompletionLossConfig) -> tuple[Tensor, Tensor]:
    """The loss as one would write it with torch.nn.functional, for its rounding error: summed loss, gradient."""
    leaf = student.detach().clone().requires_grad_()
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    s, a, b = leaf.to(wide), aligned.to(wide), base.to(wide)
    log_p = (s / cfg.temperature).log_softmax(-1)
    log_q = ((cfg.teacher_mix * a + (1 - cfg.teacher_mix) * b) / cfg.temperature).log_softmax(-1)
    kl = cfg.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    risk = (b.log_softmax(-1) > a.log_softmax(-1)).to(wide).mean(-1)
    members = (b - a).sort(dim=-1, descending=True, stable=True).indices[..., : cfg.top_k]
    completion = cfg.lambda_reg * s.gather(-1, members).square().sum(-1)
    loss = (kl + cfg.alpha_base * (1 + cfg.gamma * risk) * completion).sum()
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(
    ("implementation", "rows", "vocab", "dtype", "peaked"),
    [(name, *size) for name in RUNNABLE for size in SIZES if size[2] in DTYPES_OF[name]],
    ids=str,
)
def test_error_is_no_larger_than_eagers(
    implementation: str, rows: int, vocab: int, dtype: torch.dtype, peaked: bool
) -> None:
    student, aligned, base = three_models(rows, vocab, dtype=dtype, peaked=peaked, seed=vocab)
    cfg = config(top_k=min(100, vocab))
    options = {"config": cfg, "reduction": "sum"}
    output, gradient = check_against_oracle(student, aligned, base, implementation=implementation, **options)

    expected = oracle_rows(student, aligned, base, output, **options)
    expected_gradient = torch.stack([row.gradient for row in expected])
    expected_loss = math.fsum(row.loss for row in expected)
    eager_loss, eager_gradient = eager(student, aligned, base, cfg)
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    floor = (0.5 * torch.finfo(dtype).eps + 4 * unit) * float(expected_gradient.abs().max())
    if vocab == 1:  # eager's distillation is exactly 0; a fused one cancels log q, which rounds with the teacher
        floor += unit * float(torch.stack([student, aligned, base]).abs().max())
    error, eager_error = (float((g.double() - expected_gradient).abs().max()) for g in (gradient, eager_gradient))
    assert error <= eager_error + floor
    loss_error, eager_loss_error = (abs(float(loss.detach()) - expected_loss) for loss in (output.loss, eager_loss))
    assert loss_error <= eager_loss_error + 4 * unit * (expected_loss + float(student.abs().max()))


OPTIONS = {
    "kl_direction": ("student_teacher", "teacher_student"),
    "favored_from": ("aligned", "student"),
    "penalty": ("square", "centered_square"),
    "given": (False, True),
    "vocab_size": (None, 41),
    "weights": ("none", "kl", "completion", "both"),
    "reduction": ("mean", "sum", "none"),
    "inplace": (False, True),
}


@pytest.mark.parametrize(
    ("implementation", "case"),
    [(name, case) for name in RUNNABLE for case in pairwise({**OPTIONS, "dtype": DTYPES_OF[name]})],
    ids=lambda item: item if isinstance(item, str) else "-".join(str(value) for value in item.values()),
)
def test_options_in_every_pair(implementation: str, case: dict[str, object]) -> None:
    """Rows: sound, with absent entries, bad, not read if weighted so; two leading dimensions; padding is NaN."""
    models = three_models(2, 3, 48, dtype=case["dtype"], seed=3)
    for model in models:
        model[0, 1, 7:11] = -INF  # absent
        model[1, 1, 20] = NAN  # bad, unless not read
        if case["vocab_size"] is not None:
            model[..., case["vocab_size"] :] = NAN
    models[0][1, 2, 3] = -INF  # bad
    weight = torch.tensor([[1.0, 0.5, 2.0], [0.0, 0.0, 0.25]])
    other = torch.tensor([[0.3, 0.0, 1.5], [1.0, 0.0, 0.0]])
    options = {
        "kl_weight": weight if case["weights"] in ("kl", "both") else None,
        "completion_weight": other if case["weights"] in ("completion", "both") else None,
        "top_k_indices": None,
        "config": config(**{name: case[name] for name in ("kl_direction", "favored_from", "penalty")}),
        "vocab_size": case["vocab_size"],
        "reduction": case["reduction"],
    }
    if case["given"]:
        options["top_k_indices"] = torch.tensor([4, -1, 9, 4, 30, 0, -1, 40]).expand(2, 3, 8)
    check_against_oracle(*models, implementation=implementation, inplace=case["inplace"], **options)


@pytest.mark.parametrize(
    "scales", [{"temperature": 0.7}, {"teacher_mix": 0.4}, {"alpha_base": 0.3, "gamma": 2.5}, {"gamma": 0}]
)
@every_implementation
def test_scales(implementation: str, scales: dict[str, float]) -> None:
    models = three_models(2, 60, seed=8)
    check_against_oracle(*models, implementation=implementation, config=config(**scales), reduction="sum")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_implementation
def test_no_rows(implementation: str, reduction: str) -> None:
    models = [torch.zeros(0, 9) for _ in range(3)]
    output, gradient = loss_and_gradient(*models, config=config(), reduction=reduction, implementation=implementation)
    assert output.loss.shape == ((0,) if reduction == "none" else ())
    assert float(output.loss.detach().sum()) == 0.0
    assert (output.kl.shape, output.top_k_indices.shape, gradient.shape) == ((0,), (0, 5), (0, 9))


@every_implementation
def test_a_single_row_without_leading_dimension(implementation: str) -> None:
    output, _ = check_against_oracle(*three_models(50), implementation=implementation, config=config())
    assert (output.kl.shape, output.base_favored_count.shape, output.top_k_indices.shape) == ((), (), (5,))


@every_implementation
def test_strides_do_not_matter(implementation: str) -> None:
    student, aligned, base = three_models(4, 60)
    dense, dense_gradient = loss_and_gradient(
        student, aligned, base, config=config(), reduction="none", implementation=implementation
    )
    wide = torch.full((4, 130), NAN)
    wide[:, 1:121:2] = student
    leaf = wide.requires_grad_()
    transposed, expanded = aligned.t().contiguous().t(), base.unsqueeze(0).expand(1, 4, 60)[0]
    output = fused_completion_loss(
        leaf[:, 1:121:2], transposed, expanded, config=config(), reduction="none", implementation=implementation
    )
    output.loss.sum().backward()
    torch.testing.assert_close(output.loss, dense.loss)
    assert torch.equal(output.top_k_indices, dense.top_k_indices)
    torch.testing.assert_close(leaf.grad[:, 1:121:2], dense_gradient)


@every_implementation
def test_equal_models_differ_nowhere_whatever_their_strides(implementation: str) -> None:
    """d = 0 against a threshold that must be exactly 0: a rounding of lse(b) - lse(a) would count the vocabulary."""
    for seed in range(5):
        student, aligned, _ = three_models(6, 1000, seed=seed)
        base = aligned.t().contiguous().t()
        output = fused_completion_loss(student, aligned, base, config=config(), implementation=implementation)
        assert output.base_favored_count.tolist() == [0] * 6
        assert torch.equal(output.alpha, torch.ones(6))
        assert output.top_k_indices.tolist() == [[0, 1, 2, 3, 4]] * 6  # all tied


@every_implementation
def test_a_constant_shift_favors_nothing(implementation: str) -> None:
    """lse(b) - lse(a) must be the shift itself, although below and above 1024 each would round differently."""
    aligned = 1000.0 + (three_models(32, 500, peaked=False)[1] * 16).round() / 16  # a grid: the shift is exact
    output = fused_completion_loss(aligned, aligned, aligned + 100.0, config=config(), implementation=implementation)
    assert output.base_favored_count.tolist() == [0] * 32


@every_implementation
def test_student_equal_to_teacher(implementation: str) -> None:
    _, aligned, base = three_models(3, 200)
    output, gradient = loss_and_gradient(
        aligned, aligned, base, config=config(teacher_mix=1.0, alpha_base=0.0), implementation=implementation
    )
    assert torch.equal(output.kl, torch.zeros(3))
    assert float(gradient.abs().max()) < 1e-7


@every_implementation
def test_ties_go_to_the_lowest_index_and_minus_zero_is_zero(implementation: str) -> None:
    aligned = torch.zeros(2, 12)
    base = torch.tensor([[0, -0.0, 3, 0, 3, 3, -1, -0.0, 0, 3, 0, 0], [1.0] * 12])
    output = fused_completion_loss(
        torch.randn(2, 12), aligned, base, config=config(top_k=7), implementation=implementation
    )
    assert output.top_k_indices.tolist() == [[2, 4, 5, 9, 0, 1, 3], [0, 1, 2, 3, 4, 5, 6]]


@every_implementation
def test_all_logits_equal(implementation: str) -> None:
    models = [torch.full((2, 30), value) for value in (1.5, -2.0, 7.0)]
    output, _ = check_against_oracle(*models, implementation=implementation, config=config(), reduction="sum")
    assert output.base_favored_count.tolist() == [0, 0]


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student"])
@every_implementation
def test_extreme_logits(implementation: str, direction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    models = [1e4 * (2 * torch.rand(3, 64, generator=generator) - 1) for _ in range(3)]
    models[0][0], models[1][1], models[2][2] = 1e4, -1e4, 1e4
    output, gradient = check_against_oracle(
        *models, implementation=implementation, config=config(kl_direction=direction), reduction="sum"
    )
    assert bool(torch.isfinite(gradient).all())
    assert bool(torch.isfinite(output.loss))


@pytest.mark.parametrize("where", [0, 1, 2, (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@every_implementation
def test_a_bad_row_spoils_itself_only(
    implementation: str, value: float, where: int | tuple[int, ...], inplace: bool
) -> None:
    models = three_models(3, 40)
    options = {"config": config(), "implementation": implementation, "inplace": inplace, "vocab_size": 38}
    _, clean = loss_and_gradient(*models, reduction="none", **options)
    for index in (where,) if isinstance(where, int) else where:
        models[index][1, 17] = value
    _, gradient = check_against_oracle(*models, reduction="none", **options)
    assert bool(gradient[1, :38].isnan().all())
    assert not bool(gradient[1, 38:].any())
    assert torch.equal(gradient[[0, 2]], clean[[0, 2]])
    total, gradient = loss_and_gradient(*models, reduction="mean", **options)
    assert bool(total.loss.isnan())
    torch.testing.assert_close(3 * gradient[[0, 2]], clean[[0, 2]])


@every_implementation
def test_a_row_without_any_entry_is_bad(implementation: str) -> None:
    models = three_models(2, 40)
    for model in models:
        model[0] = -INF
    check_against_oracle(*models, implementation=implementation, config=config(), reduction="none")


@every_implementation
def test_absent_entries_are_padding(implementation: str) -> None:
    """-inf in all three models is the same as not being there: equal to the row without those entries."""
    kept = torch.tensor([index for index in range(40) if index not in (0, 5, 6, 39)])
    models = three_models(2, 40)
    for penalty in ("square", "centered_square"):
        options = {"config": config(penalty=penalty), "implementation": implementation, "reduction": "none"}
        dense, dense_gradient = loss_and_gradient(*(model[:, kept] for model in models), **options)
        holed = [model.clone().index_fill_(1, torch.tensor([0, 5, 6, 39]), -INF) for model in models]
        output, gradient = loss_and_gradient(*holed, **options)
        torch.testing.assert_close(output.loss, dense.loss)
        assert torch.equal(output.base_favored_count, dense.base_favored_count)
        assert torch.equal(output.top_k_indices, kept[dense.top_k_indices])
        torch.testing.assert_close(gradient[:, kept], dense_gradient)
        assert not bool(gradient[:, [0, 5, 6, 39]].any())


@every_implementation
def test_fewer_present_than_k(implementation: str) -> None:
    models = three_models(2, 8)
    for model in models:
        model[0, 3:] = -INF
    output, _ = check_against_oracle(*models, implementation=implementation, config=config(), reduction="none")
    assert (output.top_k_indices[0] == -1).sum() == 2


@pytest.mark.parametrize("value", [0.25, NAN, -INF], ids=str)
@every_implementation
def test_a_row_of_two_zero_weights_is_not_read(implementation: str, value: float) -> None:
    models = three_models(3, 40)
    models[0][1] = models[2][1] = value
    weight = torch.tensor([1.0, 0.0, 2.0])
    output, gradient = check_against_oracle(
        *models,
        kl_weight=weight,
        completion_weight=weight,
        implementation=implementation,
        config=config(),
        reduction="none",
    )
    assert not bool(gradient[1].any())
    assert bool(torch.isfinite(gradient).all())
    assert [statistic[1].item() for statistic in output[:5]] == [0] * 5


@every_implementation
def test_a_zero_weight_removes_an_infinite_term(implementation: str) -> None:
    """0 * inf would be NaN: here C overflows fp32 but carries no weight."""
    models = three_models(2, 40)
    models[0][0, 4] = 1e25
    output = fused_completion_loss(
        *models,
        completion_weight=torch.tensor([0.0, 1.0]),
        top_k_indices=torch.full((2, 1), 4),
        config=config(),
        reduction="none",
        implementation=implementation,
    )
    assert bool(output.completion[0].isinf())
    assert bool(torch.isfinite(output.loss).all())


@every_implementation
def test_entries_beyond_vocab_size_do_not_exist(implementation: str) -> None:
    models = three_models(2, 50)
    options = {"config": config(penalty="centered_square"), "implementation": implementation}
    cut, cut_gradient = loss_and_gradient(*(model[:, :44].contiguous() for model in models), **options)
    for model in models:
        model[:, 44:] = NAN
    padded, gradient = loss_and_gradient(*models, vocab_size=44, **options)
    for left, right in zip(cut, padded, strict=True):
        torch.testing.assert_close(left, right)
    torch.testing.assert_close(gradient[:, :44], cut_gradient)
    assert not bool(gradient[:, 44:].any())


@every_implementation
def test_given_indices_are_a_set(implementation: str) -> None:
    models = three_models(2, 40)
    for model in models:
        model[0, 6] = -INF
    options = {"config": config(), "implementation": implementation, "reduction": "none"}
    given = torch.tensor([[7, 3, 7, -1, 6, 3], [39, 0, 0, 0, -1, -1]])
    output, gradient = check_against_oracle(*models, top_k_indices=given, **options)
    assert torch.equal(output.top_k_indices, given)
    plain, plain_gradient = loss_and_gradient(*models, top_k_indices=torch.tensor([[3, 7], [0, 39]]), **options)
    torch.testing.assert_close(output.loss, plain.loss)
    torch.testing.assert_close(gradient, plain_gradient)
    selected, _ = loss_and_gradient(*models, **options)
    again, _ = loss_and_gradient(*models, top_k_indices=selected.top_k_indices, **options)
    torch.testing.assert_close(again, selected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64], ids=str)
@every_implementation
def test_weight_dtypes(implementation: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([1, 0, 1]).to(dtype)
    other = torch.tensor([0, 1, 1]).to(dtype)
    check_against_oracle(
        *three_models(3, 40),
        kl_weight=weight,
        completion_weight=other,
        config=config(),
        implementation=implementation,
    )


@every_implementation
def test_mean_divides_each_term_by_its_own_weights(implementation: str) -> None:
    models = three_models(4, 40)
    kl_weight, completion_weight = torch.tensor([2.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 3.0, 0.0, 0.0])
    options = {"config": config(), "implementation": implementation}
    mean, _ = loss_and_gradient(*models, kl_weight=kl_weight, completion_weight=completion_weight, **options)
    expected = (kl_weight * mean.kl).sum() / 4.0 + mean.alpha[1] * mean.completion[1]
    torch.testing.assert_close(mean.loss, expected)
    nothing, gradient = loss_and_gradient(
        *models, kl_weight=torch.zeros(4), completion_weight=completion_weight, **options
    )
    torch.testing.assert_close(nothing.loss, nothing.alpha[1] * nothing.completion[1])
    assert bool(torch.isfinite(gradient).all())
    empty, gradient = loss_and_gradient(*models, kl_weight=torch.zeros(4), completion_weight=torch.zeros(4), **options)
    assert empty.loss.item() == 0.0
    assert not bool(gradient.any())


@pytest.mark.parametrize(
    ("favored_from", "penalty"), list(itertools.product(["aligned", "student"], ["square", "centered_square"]))
)
@every_implementation
def test_shifting_the_student(implementation: str, favored_from: str, penalty: str) -> None:
    """centered_square cannot be escaped by lowering every logit; square can, which is why the option exists."""
    student, aligned, base = three_models(3, 60)
    options = {"config": config(favored_from=favored_from, penalty=penalty), "implementation": implementation}
    here = fused_completion_loss(student, aligned, base, **options)
    there = fused_completion_loss(student - 10.0, aligned, base, **options)
    assert torch.equal(here.top_k_indices, there.top_k_indices)
    torch.testing.assert_close(here.kl, there.kl, rtol=1e-4, atol=1e-6)
    invariant = torch.allclose(here.completion, there.completion, rtol=1e-4)
    assert invariant == (penalty == "centered_square")


@every_implementation
def test_nothing_is_written_to_the_inputs_without_inplace(implementation: str) -> None:
    models = three_models(2, 30)
    copies = [model.clone() for model in models]
    loss_and_gradient(*models, config=config(), implementation=implementation)
    assert all(torch.equal(model, copy) for model, copy in zip(models, copies, strict=True))


@every_implementation
def test_no_rows_of_any_strides(implementation: str) -> None:
    leaf = torch.zeros(0, 20, requires_grad=True)
    logits = leaf[:, ::2]
    options = {"config": CompletionLossConfig(top_k=3), "implementation": implementation}
    output = fused_completion_loss(logits, logits.detach(), logits.detach(), **options)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.top_k_indices.shape == (0, 3)
    assert leaf.grad.shape == (0, 20)


@pytest.mark.parametrize("shape", [(30,), (3, 30), (2, 3, 30), (0, 30)])
@every_implementation
def test_a_given_selection_may_have_no_column(implementation: str, shape: tuple[int, ...]) -> None:
    models = three_models(*shape)
    options = {"config": CompletionLossConfig(), "implementation": implementation}
    none = torch.zeros(*shape[:-1], 0, dtype=torch.int64)
    output, gradient = loss_and_gradient(*models, top_k_indices=none, **options)
    assert output.top_k_indices.shape == none.shape
    expected, expected_gradient = loss_and_gradient(*models, top_k_indices=torch.full((*shape[:-1], 1), -1), **options)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)
    assert not bool(output.completion.any())

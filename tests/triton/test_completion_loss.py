"""Every option of the loss's Triton kernels against float64, in the interpreter: few rows, large tiles."""

import functools
import math

import pytest
import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.completion_loss import CompletionLossConfig, CompletionLossOutput, fused_completion_loss
from deepalign.kernels.completion_loss import triton as loss_triton
from tests.kernels.loss_helpers import check_against_oracle, check_against_wide_rows, loss_and_gradient, op_call
from tests.kernels.samples import pairwise, three_models
from tests.triton.interpreted import sizes

NAN, INF = math.nan, math.inf
RUN = {"implementation": "interpreted"}
KINDS = {
    "kl_direction": ("student_teacher", "teacher_student"),
    "favored_from": ("aligned", "student"),
    "penalty": ("square", "centered_square"),
}


def config(top_k: int = 5, **changes: object) -> CompletionLossConfig:
    return CompletionLossConfig(**{"top_k": top_k, "lambda_reg": 0.01, **changes})


OPTIONS = pairwise(
    {
        **KINDS,
        "dtype": COMPILED_DTYPES,
        "vocab": (1, 7, 512, 1000, 2051),
        "padding": (0, 5),
        "given": (False, True),
        "inplace": (False, True),
        "top_k": (1, 40),
        "temperature": (2.0, 0.7),
        "weights": ("ones", "some zero"),
        "split": (1, 4),
        "reduction": ("mean", "sum", "none"),
    }
)


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_options_together(case: dict[str, object]) -> None:
    vocab, dtype = case["vocab"], case["dtype"]
    width = vocab + case["padding"]
    models = three_models(3, width, dtype=dtype, seed=vocab)
    for model in models:
        model[:, vocab:] = NAN
    given = None
    if case["given"]:
        given = torch.tensor([[vocab - 1, 0, vocab // 2, -1, 0, vocab - 1], [-1] * 6, [0, 0, 0, 0, 0, 0]])
    weights = {}
    if case["weights"] == "some zero":
        weights = {"kl_weight": torch.tensor([0.5, 0.0, 0.0]), "completion_weight": torch.tensor([0.0, 0.0, 2.0])}
        for model in models:
            model[1] = NAN  # not read
    options = {name: case[name] for name in KINDS}
    # Programs of at least a tile: a row of 2051 entries and tiles of 512 make 4.
    with sizes("completion_loss", block=512, share=2051 // case["split"], programs=1):
        check_against_oracle(
            *models,
            config=config(min(case["top_k"], vocab), temperature=case["temperature"], teacher_mix=1.3, **options),
            vocab_size=vocab,
            top_k_indices=given,
            inplace=case["inplace"],
            reduction=case["reduction"],
            gradient_rounding=3e-7,  # p - q of p near 1
            **weights,
            **RUN,
        )


def small(split: int = 4, block: int = 512, vocab: int = 2051) -> object:
    return sizes("completion_loss", block=block, share=-(-vocab // split), programs=1)


@pytest.mark.parametrize("favored_from", ["aligned", "student"])
def test_no_entry_is_favored_where_all_are_shifted_alike(favored_from: str) -> None:
    """The models are equal. Base-favored everywhere is what rounding says here without a floor for the threshold."""
    aligned = (torch.randn(8, 1040, generator=torch.Generator().manual_seed(3)) * 8).round() / 2
    base = aligned + torch.linspace(0.5, 4.0, 8)[:, None]
    with small(2, vocab=1040):
        output, _ = loss_and_gradient(
            aligned, aligned, base, config=config(favored_from=favored_from), inplace=True, **RUN
        )
    assert output.base_favored_count.tolist() == [0] * 8


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_number_of_rows(rows: int) -> None:
    models = three_models(rows, 130, dtype=torch.bfloat16)
    check_against_oracle(*models, config=config(), reduction="sum", **RUN)


def test_a_small_batch_is_split_until_it_fills_the_device() -> None:
    models = three_models(1, 9000, dtype=torch.bfloat16)
    with sizes("completion_loss", block=512, share=10**6, programs=8):
        assert loss_triton.split_of_rows(loss_triton.launch_of("completion_loss", models[0].device), 1, 9000, 512) == 8
        check_against_wide_rows(*models, config(30), **RUN)


OF_CLEAN_ROWS = {"config": config(), "reduction": "none", "vocab_size": 599, **RUN}


@functools.cache
def clean_rows() -> tuple[CompletionLossOutput, Tensor]:
    with small(2, vocab=600):
        return loss_and_gradient(*three_models(3, 600, dtype=torch.bfloat16), **OF_CLEAN_ROWS)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("model", [0, 1, 2], ids=["student", "aligned", "base"])
def test_a_bad_entry_anywhere_spoils_its_row_alone(model: int, value: float) -> None:
    models = three_models(3, 600, dtype=torch.bfloat16)
    clean, clean_gradient = clean_rows()
    with small(2, vocab=600):
        for position, inplace in ((0, False), (598, True))[value == INF :]:
            spoiled = [tensor.clone() for tensor in models]
            spoiled[model][1, position] = value
            output, gradient = loss_and_gradient(*spoiled, inplace=inplace, **OF_CLEAN_ROWS)
            for statistic in output[:4]:
                assert bool(statistic[1].isnan())
            assert int(output.base_favored_count[1]) == 0
            assert bool((output.top_k_indices[1] == -1).all())
            assert bool(gradient[1, :599].isnan().all())
            assert not bool(gradient[1, 599:].any())
            for left, right in zip((*output, gradient), (*clean, clean_gradient), strict=True):
                assert torch.equal(left[::2], right[::2])


@pytest.mark.parametrize("models", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("teacher_mix", [1.2, 1.0, 0.5])
def test_minus_infinity_in_two_models_is_bad(models: tuple[int, int], teacher_mix: float) -> None:
    logits = three_models(2, 99)
    for model in models:
        logits[model][0, 40] = -INF
    for direction in KINDS["kl_direction"]:
        options = config(teacher_mix=teacher_mix, kl_direction=direction)
        output, gradient = loss_and_gradient(*logits, config=options, reduction="none", **RUN)
        assert output.loss.isnan().tolist() == [True, False]
        assert gradient.isnan().all(-1).tolist() == [True, False]


ABSENT = {
    "the first entry": slice(0, 1),
    "a whole share": slice(512, 1024),
    "all but three": slice(3, 1090),
    "every second": slice(0, 1090, 2),
    "all": slice(0, 1090),
}


ABSENT_CASES = pairwise({"absent": tuple(ABSENT), **KINDS, "inplace": (True, False)})


@pytest.mark.parametrize("case", ABSENT_CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_absent_entries(case: dict[str, object]) -> None:
    absent = ABSENT[case["absent"]]
    models = three_models(2, 1090, dtype=torch.bfloat16)
    for model in models:
        model[0, absent] = -INF
    options = config(**{name: case[name] for name in KINDS})
    with small(4, vocab=1090):
        _, gradient = check_against_oracle(
            *models, config=options, reduction="none", inplace=case["inplace"], gradient_rounding=3e-7, **RUN
        )
    if case["absent"] != "all":
        assert not bool(gradient[0, absent].any())


def test_given_entries_that_are_absent_do_not_count() -> None:
    models = three_models(2, 99)
    for model in models:
        model[0, 6] = -INF
    given = torch.tensor([[6, 98, 98, -1, 6, 0], [6, 6, -1, -1, -1, -1]])
    check_against_oracle(*models, config=config(), top_k_indices=given, **RUN)


def test_a_first_entry_far_below_the_others_or_above_them_starts_again_carefully() -> None:
    student, aligned, base = three_models(4, 600)
    student[0, 0], aligned[1, 0], base[2, 0], student[3, 0] = -200.0, -150.0, -180.0, 120.0
    with small(2, vocab=600):
        for kind in ({}, {name: values[1] for name, values in KINDS.items()}):
            check_against_wide_rows(
                student, aligned, base, config(**kind), tolerance=2e-5, gradient_rounding=1e-5, **RUN
            )


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e12])
def test_extreme_logits(scale: float) -> None:
    """Peaks so high that the partition is one entry."""
    models = [model * scale for model in three_models(2, 700)]
    output, gradient = check_against_oracle(*models, config=config(lambda_reg=0.0), reduction="none", **RUN)
    assert bool(torch.isfinite(gradient).all())
    assert bool(torch.isfinite(output.kl).all())


def test_ties_in_every_number() -> None:
    """Few distinct differences, so that the k-th is tied within and across tiles and programs."""
    generator = torch.Generator().manual_seed(1)
    for vocab, values, top_k in ((50, 1, 40), (50, 9, 7), (2051, 1, 1), (2051, 1, 40), (2051, 2, 40), (2051, 9, 40)):
        aligned = torch.randint(-2, 3, (1, vocab), generator=generator).bfloat16()
        base = aligned + torch.randint(values, (1, vocab), generator=generator).bfloat16()
        with small(4):
            check_against_wide_rows(
                aligned * 0.5, aligned, base, config(top_k, lambda_reg=1e-4), tolerance=4e-6, inplace=True, **RUN
            )


def orders(vocab: int) -> dict[str, Tensor]:
    ramp = torch.arange(vocab, dtype=torch.float32) / 1024
    late = torch.zeros(vocab)
    late[-40:] = 2.0
    negative_zero = torch.where(torch.arange(vocab) % 3 == 0, -0.0, 0.0)
    return {"equal": ramp * 0, "ascending": ramp, "descending": -ramp, "late": late, "zeros": negative_zero}


@pytest.mark.parametrize("name", orders(1))
@pytest.mark.parametrize("top_k", [100])
def test_orders_that_defeat_bounds(name: str, top_k: int) -> None:
    base = orders(2001)[name].expand(1, -1)
    with small(2, vocab=2001, block=1024):
        check_against_wide_rows(
            base * 0.25, torch.zeros_like(base), base, config(top_k, lambda_reg=1e-4), tolerance=4e-6, **RUN
        )


@pytest.mark.parametrize("vocab", [1, 7, 33, 1100])
def test_selections_of_every_size(vocab: int) -> None:
    models = three_models(1, vocab, peaked=False)
    for top_k in {1, max(1, vocab // 2), vocab} if vocab < 1000 else {vocab // 2, vocab}:
        for penalty, inplace in (("square", False), ("centered_square", True)):
            options = config(top_k, penalty=penalty)
            check_against_wide_rows(*models, options, tolerance=4e-6, inplace=inplace, gradient_rounding=1e-7, **RUN)


def test_more_given_than_a_program_lists() -> None:
    models = three_models(2, 1600)
    given = torch.randint(-1, 1600, (2, 1100), generator=torch.Generator().manual_seed(0))
    check_against_oracle(*models, config=config(), top_k_indices=given, gradient_rounding=1e-7, **RUN)


@pytest.mark.parametrize("kind", pairwise(KINDS), ids=lambda kind: "-".join(kind.values()))
def test_equal_models(kind: dict[str, str]) -> None:
    student, aligned, _ = three_models(2, 1031, dtype=torch.bfloat16)
    with small(2, vocab=1031):
        output, _ = loss_and_gradient(student, aligned, aligned.clone(), config=config(**kind), **RUN)
        if kind["favored_from"] == "aligned":
            assert output.base_favored_count.tolist() == [0, 0]
            assert output.top_k_indices.tolist() == [list(range(5))] * 2
        nothing = config(alpha_base=0.0, **kind)
        output, gradient = loss_and_gradient(aligned, aligned, aligned.clone(), config=nothing, **RUN)
        assert output.kl.tolist() == [0.0, 0.0]
        assert output.base_favored_count.tolist() == [0, 0]
        assert float(gradient.abs().max()) <= 3e-7


# ---- layouts: where rows begin decides how tiles are read


def shifted(model: Tensor, before: int, after: int) -> Tensor:
    buffer = torch.full((len(model), model.shape[1] + before + after), NAN, dtype=model.dtype)
    buffer[:, before : before + model.shape[1]] = model
    return buffer[:, before : before + model.shape[1]]


LAYOUTS = {
    "16 bytes": ((0, 0), (0, 0), (0, 0), 1024, 1),
    "odd rows": ((0, 0), (0, 0), (0, 0), 1025, 2),
    "alike, from the third entry on": ((3, 8), (3, 8), (3, 8), 1021, 2),
    "of different strides": ((0, 0), (0, 1), (0, 0), 1024, 0),
    "of different starts": ((1, 15), (0, 16), (2, 14), 1024, 0),
}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(name, torch.bfloat16) for name in LAYOUTS]
    + [("16 bytes", torch.float16), ("alike, from the third entry on", torch.float16)]
    + [("odd rows", torch.float32), ("of different starts", torch.float32)],
    ids=str,
)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    *places, vocab, align = LAYOUTS[layout]
    models = three_models(3, vocab, dtype=dtype)
    moved = [shifted(model, *place) for model, place in zip(models, places, strict=True)]
    assert loss_triton.alignment(moved, vocab)[0] == align
    with small(2, vocab=vocab):
        output, gradient = check_against_oracle(*moved, config=config(), **RUN)
        expected, expected_gradient = check_against_oracle(*models, config=config(), inplace=True, **RUN)
    for left, right in zip((*output, gradient), (*expected, expected_gradient), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5 if left.dtype != dtype else 8e-3, atol=1e-6)


@pytest.mark.parametrize("place", [(0, 0), (5, 3), (8, 16)], ids=str)
def test_in_place_writes_the_logits_and_nothing_beside_them(place: tuple[int, int]) -> None:
    student, aligned, base = three_models(3, 77, dtype=torch.bfloat16)
    options = {"config": config(), "vocab_size": 70, **RUN}
    expected, expected_gradient = loss_and_gradient(student, aligned, base, **options)
    logits = shifted(student, *place)
    whole = logits._base
    before = whole.clone()
    output = fused_completion_loss(
        logits.add_(torch.zeros(1, requires_grad=True).bfloat16()), aligned, base, inplace=True, **options
    )
    torch.testing.assert_close(logits.detach(), expected_gradient, rtol=8e-3, atol=1e-7)
    assert not bool(logits[:, 70:].any())
    assert torch.equal(output.top_k_indices, expected.top_k_indices)
    logits.detach().copy_(student)
    torch.testing.assert_close(whole.detach(), before, rtol=0, atol=0, equal_nan=True)


def test_forward_only_says_the_same() -> None:
    models = three_models(1, 1500, dtype=torch.bfloat16)
    with small(2, vocab=1500):
        for kind in ({}, {name: values[1] for name, values in KINDS.items()}):
            with_gradient, _ = loss_and_gradient(*models, config=config(**kind), **RUN)
            alone = fused_completion_loss(*models, config=config(**kind), **RUN)
            for left, right in zip(alone, with_gradient, strict=True):
                torch.testing.assert_close(left, right.detach())


@pytest.mark.parametrize("given", [False, True])
def test_one_launch_gives_the_same_as_two(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that waits for others cannot be interpreted alone; here it finds what they published before."""
    models = three_models(3, 2051, dtype=torch.bfloat16)
    indices = torch.tensor([[7, 2050, -1, 7]] * 3) if given else None
    arguments = op_call(*models, top_k_indices=indices)
    published: list[Tensor] = []

    def kept(programs: int, device: torch.device) -> Tensor:
        published.append(torch.zeros(programs * 16 + 1, dtype=torch.int64))
        return published[-1]

    def again(programs: int, device: torch.device) -> Tensor:
        published[0][-1] = 0
        return published[0]

    with small(4):
        monkeypatch.setattr(loss_triton, "_new_words", kept)
        expected = torch.empty_like(models[0])
        statistics = loss_triton.completion_loss_(*arguments, expected, together=False)
        monkeypatch.setattr(loss_triton, "_new_words", again)
        gradient = torch.empty_like(models[0])
        together = loss_triton.completion_loss_(*arguments, gradient)
    assert int(published[0][-1]) == 12  # programs that drew a number
    assert torch.equal(gradient, expected)
    for left, right in zip(together, statistics, strict=True):
        torch.testing.assert_close(left, right)  # the penalty's terms are added in another order


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("total", [False, True])
def test_the_op_reduces_as_the_cpus_does(mean: bool, total: bool) -> None:
    models = three_models(3, 257)
    options = {"kl_weight": None, "completion_weight": torch.tensor([0.5, 0.0, 2.0])}
    gradient, expected_gradient = torch.empty_like(models[0]), torch.empty_like(models[0])
    with small(2):
        arguments = op_call(*models, **options)
        output = loss_triton.completion_loss_(*arguments, gradient, mean, total, together=False)
    weights = [torch.ones(3), options["completion_weight"]]
    weights = [weight / weight.sum() if mean else weight for weight in weights]
    arguments = op_call(*models, kl_weight=weights[0], completion_weight=weights[1])
    loss, *statistics = torch.ops.deepalign.completion_loss_(*arguments, expected_gradient)
    for left, right in zip(output, (loss.sum() if total else loss, *statistics), strict=True):
        torch.testing.assert_close(left, right)
    torch.testing.assert_close(gradient, expected_gradient)


def test_results_do_not_depend_on_what_else_is_in_the_batch() -> None:
    models = three_models(3, 1504, dtype=torch.bfloat16)
    with small(2, vocab=1504):
        output, gradient = loss_and_gradient(*models, config=config(), reduction="none", **RUN)
        alone, alone_gradient = loss_and_gradient(
            *(model[1:2] for model in models), config=config(), reduction="none", **RUN
        )
    for left, right in zip((*output, gradient), (*alone, alone_gradient), strict=True):
        assert torch.equal(left[1:2], right)

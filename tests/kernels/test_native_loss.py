"""The CPU kernels of the completion loss over every width, layout, tie and option, against float64."""

import itertools
import math

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
)
from tests.kernels.samples import three_models

pytestmark = needs_native
NAN, INF = math.nan, math.inf
# (rows, vocabulary): published vocabularies, and one entry more and less
VOCABULARIES = [(3, 1), (3, 7), (1, 100), (3, 128), (3, 4096), (1, 32000), (1, 128255), (1, 128257), (1, 151936)]
# around the steps (8 to 32 entries), blocks (up to 512) and segments (16384) that a row is cut into
EDGES = [edge + change for edge in (64, 96, 128, 256, 512, 1024, 2048) for change in (-1, 0, 1)]
WIDTHS = [*range(1, 70), *EDGES, 16383, 16384, 16385, 32768, 32769 + 32]
KINDS = [
    {"kl_direction": direction, "favored_from": favored_from, "penalty": penalty}
    for direction, favored_from, penalty in itertools.product(
        ("student_teacher", "teacher_student"), ("aligned", "student"), ("square", "centered_square")
    )
]


def config(top_k: int = 5, **changes: object) -> CompletionLossConfig:
    return CompletionLossConfig(**{"top_k": top_k, "lambda_reg": 0.01, **changes})


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer is full of NaN, or of the largest integer, before a kernel writes it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert bool(torch.zeros(2).new_empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), VOCABULARIES)
def test_vocabularies(rows: int, vocab: int, dtype: torch.dtype) -> None:
    models = three_models(rows, vocab, dtype=dtype, seed=vocab)
    check_against_wide_rows(*models, config(min(100, vocab)))


def test_a_vocabulary_of_2_to_the_20() -> None:
    models = three_models(1, 2**20, dtype=torch.bfloat16)
    check_against_wide_rows(*models, config(100), inplace=True)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
def test_every_width(dtype: torch.dtype) -> None:
    for vocab in WIDTHS:
        models = three_models(2, vocab, dtype=dtype, seed=vocab)
        check_against_wide_rows(*models, config(min(3, vocab), **KINDS[vocab % len(KINDS)]), inplace=vocab % 3 == 0)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [515, 5000, 40001])
def test_options_together(vocab: int, dtype: torch.dtype) -> None:
    models = three_models(2, vocab, dtype=dtype, seed=vocab)
    given = torch.tensor([[vocab - 1, 0, 7, -1, 7, 64, -1], [-1, 3, 3, 3, 511, vocab - 2, 16]])
    for kind, temperature in zip(KINDS, (1.0, 0.5, 3.0, 1.3) * 2, strict=True):
        options = config(20, teacher_mix=0.7, gamma=2.0, temperature=temperature, **kind)
        check_against_wide_rows(*models, options)
        check_against_wide_rows(*models, options, given, inplace=True)


@pytest.mark.parametrize("vocab", [1, 7, 33, 600, 4097])
def test_selections_of_every_size(vocab: int) -> None:
    student, aligned, base = three_models(2, vocab, peaked=False)
    for top_k in {1, min(2, vocab), max(1, vocab // 3), max(1, vocab // 2), max(1, vocab - 1), vocab}:
        for penalty, inplace in (("square", False), ("centered_square", True)):
            options = config(top_k, penalty=penalty)
            check_against_wide_rows(student, aligned, base, options, inplace=inplace)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
def test_ties_in_every_number(dtype: torch.dtype) -> None:
    """Few distinct differences, so that the k-th is tied within and across steps, blocks and segments."""
    generator = torch.Generator().manual_seed(1)
    for vocab, values, top_k in itertools.product((50, 1111, 40000), (1, 2, 9), (1, 40, 600)):
        if top_k <= vocab:
            aligned = torch.randint(-2, 3, (2, vocab), generator=generator).to(dtype)
            base = aligned + torch.randint(values, (2, vocab), generator=generator).to(dtype)
            check_against_wide_rows(aligned * 0.5, aligned, base, config(top_k, lambda_reg=1e-4))


def orders(vocab: int) -> dict[str, Tensor]:
    """Differences in multiples of 1/8, which every dtype's inputs give exactly where these are whole."""
    ramp = torch.arange(vocab, dtype=torch.float32) / 1024
    sawtooth = torch.arange(vocab, dtype=torch.float32) % 1000 / 64
    last = torch.zeros(vocab)
    last[-40:] = 2.0
    return {"equal": ramp * 0, "ascending": ramp, "descending": -ramp, "sawtooth": sawtooth, "late": last}


@pytest.mark.parametrize("name", orders(1))
def test_orders_that_defeat_bounds(name: str) -> None:
    base = orders(20001)[name].expand(2, -1)
    for top_k in (1, 100, 2000):
        check_against_wide_rows(base * 0.25, torch.zeros_like(base), base, config(top_k, lambda_reg=1e-4))


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [7, 128, 4097, 33000])
@pytest.mark.parametrize("kind", KINDS[:2] + KINDS[4:6], ids=lambda kind: "-".join(kind.values()))
def test_equal_models(vocab: int, dtype: torch.dtype, kind: dict[str, str]) -> None:
    student, aligned, _ = three_models(2, vocab, dtype=dtype)
    top = list(range(5))
    output, _ = loss_and_gradient(student, aligned, aligned.clone(), config=config(**kind), implementation="cpu")
    assert output.base_favored_count.tolist() == [0, 0]
    assert output.alpha.tolist() == [1.0, 1.0]
    assert output.top_k_indices.tolist() == [top, top]
    nothing = config(teacher_mix=1.0, alpha_base=0.0, **kind)
    _, aligned, base = three_models(2, vocab, dtype=dtype)
    for models, options in (((aligned, aligned, base), nothing), ((base, base, base), config(alpha_base=0.0, **kind))):
        output, gradient = loss_and_gradient(*models, config=options, implementation="cpu")
        assert output.kl.tolist() == [0.0, 0.0]
        assert not bool(gradient.any())
        assert float(output.loss.detach()) == 0.0


def test_the_student_as_reference_equal_to_the_base_model() -> None:
    student, aligned, _ = three_models(3, 5001)
    options = {"config": config(favored_from="student"), "implementation": "cpu"}
    output = fused_completion_loss(student, aligned, student.clone(), **options)
    assert output.base_favored_count.tolist() == [0] * 3
    assert output.top_k_indices.tolist() == [[0, 1, 2, 3, 4]] * 3


# ---- layouts


def wide_row_stride(model: Tensor) -> Tensor:
    buffer = torch.full((len(model), model.shape[1] + 13), NAN, dtype=model.dtype)
    buffer[:, 5:-8] = model
    return buffer[:, 5:-8]


def every_second_entry(model: Tensor) -> Tensor:
    buffer = torch.full((len(model), 2 * model.shape[1] + 3), NAN, dtype=model.dtype)
    buffer[:, 1 : 2 * model.shape[1] : 2] = model
    return buffer[:, 1 : 2 * model.shape[1] : 2]


def transposed(model: Tensor) -> Tensor:
    return model.t().contiguous().t()


LAYOUTS = [wide_row_stride, every_second_entry, transposed]


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("vocab", [1, 45, 1030])
def test_layouts_give_the_same_bits(layout: object, vocab: int, dtype: torch.dtype) -> None:
    models = three_models(3, vocab, dtype=dtype)
    options = {"config": config(min(5, vocab)), "implementation": "cpu", "reduction": "none"}
    expected, expected_gradient = loss_and_gradient(*models, **options)
    leaves = [layout(model).detach() for model in models]
    student = leaves[0].requires_grad_()
    output = fused_completion_loss(student, *leaves[1:], **options)
    (gradient,) = torch.autograd.grad(output.loss.sum(), student)
    for left, right in zip((*output, gradient), (*expected, expected_gradient), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, torch.clone], ids=lambda layout: layout.__name__)
def test_in_place_writes_the_logits_and_nothing_beside_them(layout: object, dtype: torch.dtype) -> None:
    student, aligned, base = three_models(3, 77, dtype=dtype)
    student[:, 70:] = aligned[:, 70:] = base[:, 70:] = NAN
    options = {"config": config(), "implementation": "cpu", "vocab_size": 70}
    expected, expected_gradient = loss_and_gradient(student, aligned, base, **options)
    logits = layout(student)
    whole = logits if logits._base is None else logits._base
    before = whole.clone()
    leaf = torch.zeros(3, 77, dtype=dtype, requires_grad=True)
    output = fused_completion_loss(logits.add_(leaf), aligned, base, inplace=True, **options)
    assert torch.equal(logits, expected_gradient)
    assert not bool(logits[:, 70:].any())
    for left, right in zip(output, expected, strict=True):
        assert torch.equal(left, right)
    logits.detach().copy_(student)
    torch.testing.assert_close(whole.detach(), before, rtol=0, atol=0, equal_nan=True)


def test_expanded_teachers_and_more_dimensions() -> None:
    student = three_models(2, 3, 500)[0]
    _, aligned, base = three_models(1, 1, 500)
    options = {"config": config(), "implementation": "cpu", "reduction": "none"}
    expanded, expanded_gradient = loss_and_gradient(
        student, aligned.expand(2, 3, 500), base.expand(2, 3, 500), **options
    )
    copies = (model.expand(6, 1, 500)[:, 0].contiguous() for model in (aligned, base))
    flat, flat_gradient = loss_and_gradient(student.view(6, 500), *copies, **options)
    for left, right in zip((*expanded, expanded_gradient), (*flat, flat_gradient), strict=True):
        assert torch.equal(left, right.view(left.shape))
    check_against_oracle(
        student, aligned.expand(2, 3, 500), base.expand(2, 3, 500), implementation="cpu", config=config()
    )

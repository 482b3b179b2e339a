"""How far the CPU kernels are from float64: 1e-6 (1 + |value|) for logits within 50, at every temperature."""

import itertools

import pytest
import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.completion_loss import CompletionLossConfig, fused_completion_loss
from deepalign.kernels.position_divergence import base_favored_tokens, position_divergence
from tests.kernels.loss_helpers import check_against_wide_rows, loss_and_gradient, needs_native
from tests.kernels.samples import Case, pairwise

pytestmark = needs_native
HALF_PLACE = 2.0**-19  # of a float between 32 and 64: what rounding the teacher's logit may put into a gradient
SIZES = [(400, 2), (200, 100), (60, 500), (16, 5000), (4, 32000)]


def peaked(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    """One entry 20 to 40 above the rest, the models apart by some tenths."""
    shared = torch.randn(rows, vocab, generator=generator) * 2 - 2
    top = torch.randint(vocab, (rows, 1), generator=generator)
    shared.scatter_(1, top, 20 + 20 * torch.rand(rows, 1, generator=generator))
    return [shared + spread * torch.randn(rows, vocab, generator=generator) for spread in (0.5, 0.3, 0.8)]


def shifted(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    _, aligned, base = peaked(rows, vocab, generator)
    return [aligned - 15.0, aligned, base]


def uniform(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    return [100 * torch.rand(rows, vocab, generator=generator) - 50 for _ in range(3)]


def nearly_equal(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    shared = 100 * torch.rand(rows, vocab, generator=generator) - 50
    return [shared + 0.1 * torch.randn(rows, vocab, generator=generator) for _ in range(3)]


def two_valued(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    """A student of equal terms, which a lane rounds alike in every block."""
    heads = torch.rand(rows, vocab, generator=generator) < 0.5
    normal = torch.randn(2, rows, vocab, generator=generator)
    return [torch.where(heads, 50.0, -50.0), *(3 * normal + 20)]


def constant(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    """Differences of logits that no float holds, all the same."""
    return [(100 * torch.rand(rows, 1, generator=generator) - 50).expand(rows, vocab) for _ in range(3)]


def ascending(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    """A student whose first entry is e^100 below its last: sums that are relative to the first overflow."""
    student = torch.linspace(-50, 50, vocab).expand(rows, vocab)
    return [student, *(3 * torch.randn(2, rows, vocab, generator=generator))]


def stepped(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    """Few values, the student's in order: two blocks have nearly all of its mass, in runs of equal terms."""
    student = (4 * torch.linspace(46, -26, vocab)).round() / 4
    values = 2 * torch.randn(2, rows, 6, generator=generator)
    choices = torch.randint(6, (2, rows, vocab), generator=generator)
    return [student.expand(rows, vocab), *values.gather(-1, choices)]


def lifted(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    """Few values again, a third of the student's far above its teacher, the others just not lost beside them."""
    third = torch.rand(rows, vocab, generator=generator) < 0.3
    return [torch.where(third, 27.123, 0.3), *torch.randn(2, rows, vocab, generator=generator)]


def runs(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    """Few values side by side: whole blocks of equal terms, of which a few have most of the mass."""
    values = 3 * torch.randn(2, rows, 6, generator=generator)
    student, aligned = values[..., torch.arange(vocab) * 6 // vocab]
    return [student, aligned, torch.linspace(-20, 30, vocab).expand(rows, vocab)]


def scattered(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    """Few values of the student anywhere, after one of its own, against a teacher of one."""
    values = (100 * torch.rand(rows, 3, generator=generator) - 50).clamp(max=20)
    student = values.gather(-1, torch.randint(3, (rows, vocab), generator=generator))
    student[:, 0] = -9.0
    return [student, torch.full((rows, vocab), 4.3), 3 * torch.randn(rows, vocab, generator=generator)]


def opposed(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    """Two values, near 50 and -50 in the other model: the teacher's are all rounded alike."""
    high, low = 49 + torch.rand(rows, 2, generator=generator), -49 - torch.rand(rows, 2, generator=generator)
    student = torch.tensor([30.0, -10.0]) * torch.rand(rows, 2, generator=generator)
    which = torch.arange(vocab) % 2
    return [values[:, which] for values in (student, high, low)]


def close(rows: int, vocab: int, generator: torch.Generator) -> list[Tensor]:
    """Nearly no divergence: at a high temperature its square multiplies what rounding leaves."""
    shared = 3 * torch.randn(rows, vocab, generator=generator)
    return [shared + spread * torch.randn(rows, vocab, generator=generator) for spread in (0.3, 0.5, 0.9)]


ALIKE = (two_valued, constant, stepped, lifted, runs, scattered, opposed)
ROWS = (peaked, uniform, nearly_equal, shifted, ascending, close, *ALIKE)
OPTIONS = {
    "temperature": (0.5, 1.0, 1.3, 2.0, 5.0, 20.0),
    "kl_direction": ("student_teacher", "teacher_student"),
    "teacher_mix": (1.2, 0.5),
}
ACCURACY = pairwise({"rows_of": ROWS, "dtype": COMPILED_DTYPES, **OPTIONS})


@pytest.mark.parametrize("case", ACCURACY, ids=lambda case: f"{case['rows_of'].__name__}-{case['dtype']}")
def test_within_a_millionth_of_float64(case: Case) -> None:
    rows_of, dtype, *options = case.values()
    config = dict(zip(OPTIONS, options, strict=True))
    generator = torch.Generator().manual_seed(int(10 * config["temperature"]))
    for rows, vocab in SIZES:
        models = [model.clamp(-50, 50).to(dtype) for model in rows_of(rows, vocab, generator)]
        loss = CompletionLossConfig(top_k=min(20, vocab), **config)
        # of s / tau and (s - t) / tau, larger below 1 and where the models are 100 apart, and of tau (p - q)
        tau = config["temperature"]
        rounding = (4 if rows_of is opposed else 1) * HALF_PLACE * max(1.0, 1 / tau, tau / 8)
        check_against_wide_rows(*models, loss, gradient_rounding=rounding)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rows_of", ROWS, ids=lambda f: f.__name__)
def test_the_reverse_direction_too(rows_of: object, temperature: float) -> None:
    generator = torch.Generator().manual_seed(7)
    for rows, vocab in SIZES:
        models = [model.clamp(-50, 50) for model in rows_of(rows, vocab, generator)]
        config = CompletionLossConfig(top_k=1, temperature=temperature, kl_direction="teacher_student")
        check_against_wide_rows(*models, config, gradient_rounding=HALF_PLACE)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_rounding_of_the_teachers_logit_is_made_up_for(temperature: float) -> None:
    """Few entries have its mass, s and t are up to 100 apart: their products are not off by 4e-6, as t is."""
    config = CompletionLossConfig(top_k=1, temperature=temperature, kl_direction="teacher_student")
    models = uniform(4000, 100, torch.Generator().manual_seed(8))
    check_against_wide_rows(*models, config, gradient_rounding=HALF_PLACE)


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student"])
def test_a_hundred_entries_at_a_temperature_of_4(direction: str) -> None:
    """Too few for their errors to make up for each other: 16 times these were up to 1.8e-6 in 20000 rows."""
    config = CompletionLossConfig(top_k=1, temperature=4.0, kl_direction=direction)
    models = nearly_equal(20000, 100, torch.Generator().manual_seed(4))
    check_against_wide_rows(*models, config, gradient_rounding=HALF_PLACE)


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student"])
def test_a_coarse_grid_at_a_temperature_of_4(direction: str) -> None:
    """bfloat16 logits around -19: few values, each of which an exponential rounds alike all over the row."""
    config = CompletionLossConfig(top_k=1, temperature=4.0, kl_direction=direction, teacher_mix=0.5)
    for seed, vocab in ((164, 28000), (300, 32000)):
        models = [model.bfloat16() for model in shifted(4, vocab, torch.Generator().manual_seed(seed))]
        check_against_wide_rows(*models, config, gradient_rounding=HALF_PLACE)


def test_the_count_is_exact_away_from_the_boundary() -> None:
    """Base logits that move half of the entries up and half down by 1/2: nothing lies near the threshold."""
    generator = torch.Generator().manual_seed(2)
    aligned = torch.randn(50, 3001, generator=generator)
    up = torch.rand(50, 3001, generator=generator) < 0.5
    base = aligned + torch.where(up, 0.5, -0.5)
    output, _ = check_against_wide_rows(aligned, aligned, base, CompletionLossConfig(top_k=1))
    assert torch.equal(output.base_favored_count, up.sum(-1))


def test_the_count_where_one_entry_has_the_mass() -> None:
    """Its difference is the threshold, half of the others are 5e-7 above it, half below. Pass 1's exponentials of
    aligned and base logits are off by up to 7e-7 under AVX-512: where few of them count, they are taken again."""
    generator = torch.Generator().manual_seed(3)
    peak, excess = 20 + 20 * torch.rand(500, generator=generator), 0.25 + 0.75 * torch.rand(500, generator=generator)
    aligned, base = torch.zeros(2, 500, 1001)
    aligned[:, 0], base[:, 0] = peak, peak + excess
    threshold = (base[:, 0] - aligned[:, 0]).double()
    above = torch.arange(1000) % 2 == 0
    base[:, 1:] = (threshold[:, None] + torch.where(above, 5e-7, -5e-7).double()).float()
    output = fused_completion_loss(
        aligned, aligned, base, config=CompletionLossConfig(top_k=1), reduction="none", implementation="cpu"
    )
    beside = output.base_favored_count - above.sum()  # the entry itself is on the boundary
    assert ((beside == 0) | (beside == 1)).all()


FLAT = {
    "constant": (lambda noise: 1.5 + 0 * noise, lambda noise: -2.0 + 0 * noise, lambda noise: 3.0 + 0 * noise),
    "nearly constant": (lambda noise: 1e-3 * noise, lambda noise: -2.0 + 0 * noise, lambda noise: 3.0 + 0 * noise),
    "a flat teacher": (lambda noise: noise, lambda noise: -7.0 + 0 * noise, lambda noise: 2.0 + 0 * noise),
    "far below": (lambda noise: 4 * noise - 30, lambda noise: 4 * noise, lambda noise: 4 * noise),
    "far above": (lambda noise: 4 * noise + 30, lambda noise: 4 * noise, lambda noise: 4 * noise + 2),
}


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student"])
@pytest.mark.parametrize("models", FLAT.values(), ids=FLAT)
def test_rows_whose_parts_cancel_or_are_all_alike(models: tuple, direction: str) -> None:
    """A divergence that is small beside how far s and t are apart; terms that are rounded alike where they add up."""
    generator = torch.Generator().manual_seed(5)
    for rows, vocab in ((20, 65), (8, 1000), (3, 32000), (2, 40001)):
        noise = torch.randn(rows, vocab, generator=generator).clamp(-4, 4)
        config = CompletionLossConfig(top_k=5, lambda_reg=1e-6, kl_direction=direction)
        logits = [model(noise) for model in models]
        check_against_wide_rows(*logits, config, gradient_rounding=HALF_PLACE)


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student"])
@pytest.mark.parametrize("scale", [1e7, 1e9, 1e15, 1e30])
def test_logits_of_which_floats_are_far_apart(scale: float, direction: str) -> None:
    generator = torch.Generator().manual_seed(6)
    models = [scale * torch.randn(64, 200, generator=generator) for _ in range(3)]
    config = CompletionLossConfig(top_k=2, lambda_reg=0.0, kl_direction=direction)
    student = models[0].clone().requires_grad_()
    output = fused_completion_loss(student, *models[1:], config=config, reduction="none", implementation="cpu")
    output.loss.sum().backward()
    wide = [model.double() for model in models]
    expected = fused_completion_loss(*wide, config=config, reduction="none", implementation="reference")
    torch.testing.assert_close(output.kl.double(), expected.kl.double(), rtol=1e-6, atol=0)
    assert bool(student.grad.isfinite().all())
    alone = [model[:, :1] for model in models]  # one entry: nothing to diverge
    one = CompletionLossConfig(top_k=1, kl_direction=direction)
    kl = fused_completion_loss(*alone, config=one, reduction="none", implementation="cpu").kl
    assert float(kl.abs().max()) <= 1e-12 * scale


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student"])
@pytest.mark.parametrize("scale", [1e12, 1e20, 1e30])
def test_one_model_alone_has_logits_of_which_floats_are_far_apart(scale: float, direction: str) -> None:
    """Both are sure of the same entry; the teacher's logit of it is lost beside the student's."""
    student, frozen = torch.tensor([[0.0, scale, 0.0]]), torch.tensor([[-scale, 1.3, -scale]])
    for temperature in (2.0, 100.0):
        config = CompletionLossConfig(top_k=1, lambda_reg=0.0, kl_direction=direction, temperature=temperature)
        output = fused_completion_loss(student, frozen, frozen, config=config, implementation="cpu")
        assert output.kl.item() == 0.0


@pytest.mark.parametrize("shift", [0.5, -3.0, 17.25])
def test_no_entry_is_favored_where_all_are_shifted_alike(shift: float) -> None:
    """The models are equal. Base-favored everywhere is what rounding may say, and what probabilities cannot."""
    generator = torch.Generator().manual_seed(3)
    aligned = (torch.randn(64, 4001, generator=generator) * 8).round() / 2
    base = aligned + shift
    absent = aligned.clone(), base.clone()
    for model in absent:
        model[:, 7:900] = -float("inf")
    for pair in ((aligned, base), absent):
        counts = [
            base_favored_tokens(*pair, top_k=1, implementation="cpu").count,
            *position_divergence(*pair, implementation="cpu")[-2:],
        ]
        for favored_from, inplace in itertools.product(("aligned", "student"), (False, True)):
            config = CompletionLossConfig(favored_from=favored_from)
            output, _ = loss_and_gradient(pair[0], *pair, config=config, inplace=inplace, implementation="cpu")
            counts.append(output.base_favored_count)
        for count in counts:
            assert not bool(count.any())


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
@pytest.mark.parametrize("vocab", [1000, 40000])
@pytest.mark.parametrize("rows_of", [two_valued, ascending, stepped], ids=lambda f: f.__name__)
def test_divergences_of_two_models(rows_of: object, vocab: int, dtype: torch.dtype) -> None:
    """Rows of few values, whose terms are rounded alike; others are ten times as exact."""
    models = [model.to(dtype) for model in rows_of(4, vocab, torch.Generator().manual_seed(8))]
    for aligned, base in itertools.combinations(models, 2):
        output = position_divergence(aligned, base, implementation="cpu")
        expected = position_divergence(aligned.double(), base.double(), implementation="reference")
        for name in ("kl", "reverse_kl", "jsd"):
            ours, exact = getattr(output, name).double(), getattr(expected, name).double()
            torch.testing.assert_close(ours, exact, rtol=2e-6, atol=2e-6)


def test_divergences_of_rows_of_two_values() -> None:
    """Each model has two logits only: a block's error is the row's, unless blocks err differently."""
    generator = torch.Generator().manual_seed(9)
    values, choices = (
        3 * torch.randn(2, 24, 2, generator=generator),
        torch.randint(2, (2, 24, 151937), generator=generator),
    )
    aligned, base = values.gather(-1, choices).bfloat16()
    output = position_divergence(aligned, base, implementation="cpu")
    expected = position_divergence(aligned.double(), base.double(), implementation="reference")
    for name in ("kl", "reverse_kl", "jsd"):
        ours, exact = getattr(output, name).double(), getattr(expected, name).double()
        assert float(((ours - exact).abs() / (1 + exact)).max()) <= 1e-6


@pytest.mark.parametrize("vocab", [7, 4096, 128256])
def test_nothing_is_between_models_whose_logits_are_all_equal(vocab: int) -> None:
    """Equal terms are all rounded alike where they are added up, to 2e-6 of their sum."""
    constants = torch.tensor([0.3, -1.7, 5.1])[:, None].expand(3, vocab)
    output = position_divergence(constants, torch.full_like(constants, 0.77), top_n=1, implementation="cpu")
    for divergence in output[:3]:
        assert float(divergence.max()) <= 4e-7
    assert output.favored_count.tolist() == [0, 0, 0]

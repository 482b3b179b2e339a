"""How far the CPU kernels are from float64: 1e-6 (1 + |value|) for logits within 50, at temperatures up to 2.

Two things are left to rounding. Above a temperature of 2 it is that of the exponentials, see `tolerance_at`. In the
reverse direction that of the teacher's logit to a float (2e-6 at 50) is multiplied by how far s and t are apart, which
in `uniform` is up to 100.
"""

import pytest
import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.completion_loss import CompletionLossConfig
from tests.kernels.loss_helpers import check_against_wide_rows, needs_native, tolerance_at

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


@pytest.mark.parametrize("temperature", [1.0, 1.3, 2.0, 5.0])
@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize("rows_of", [peaked, uniform, nearly_equal, shifted], ids=lambda f: f.__name__)
def test_within_a_millionth_of_float64(rows_of: object, dtype: torch.dtype, temperature: float) -> None:
    generator = torch.Generator().manual_seed(int(10 * temperature))
    for rows, vocab in SIZES:
        models = [model.clamp(-50, 50).to(dtype) for model in rows_of(rows, vocab, generator)]
        config = CompletionLossConfig(top_k=min(20, vocab), temperature=temperature)
        check_against_wide_rows(*models, config, tolerance=tolerance_at(temperature), gradient_rounding=HALF_PLACE)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rows_of", [peaked, uniform, nearly_equal, shifted], ids=lambda f: f.__name__)
def test_the_reverse_direction_too(rows_of: object, temperature: float) -> None:
    generator = torch.Generator().manual_seed(7)
    for rows, vocab in SIZES:
        models = [model.clamp(-50, 50) for model in rows_of(rows, vocab, generator)]
        config = CompletionLossConfig(top_k=1, temperature=temperature, kl_direction="teacher_student")
        tolerance = 5e-6 if rows_of is uniform else 1e-6
        check_against_wide_rows(*models, config, tolerance=tolerance, gradient_rounding=HALF_PLACE)


def test_the_count_is_exact_away_from_the_boundary() -> None:
    """Base logits that move half of the entries up and half down by 1/2: nothing lies near the threshold."""
    generator = torch.Generator().manual_seed(2)
    aligned = torch.randn(50, 3001, generator=generator)
    up = torch.rand(50, 3001, generator=generator) < 0.5
    base = aligned + torch.where(up, 0.5, -0.5)
    output, _ = check_against_wide_rows(aligned, aligned, base, CompletionLossConfig(top_k=1))
    assert torch.equal(output.base_favored_count, up.sum(-1))

"""Numbers next to 0 in the CPU kernels: their loops over exponentials flush them, which selections must not notice."""

import itertools

import pytest
import torch
from torch import Tensor

from deepalign.kernels.completion_loss import CompletionLossConfig, fused_completion_loss
from deepalign.kernels.contrastive_sample import contrastive_logits, contrastive_sample
from deepalign.kernels.position_divergence import base_favored_tokens, position_statistics
from tests.kernels.loss_helpers import check_against_wide_rows, loss_and_gradient, needs_native
from tests.kernels.samples import largest

pytestmark = needs_native
LEAST_NORMAL = torch.finfo(torch.float32).tiny
DTYPES = (torch.float32, torch.bfloat16)  # float16 has no number that small
VOCAB = 3001


def tiny_numbers(rows: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(rows, VOCAB) of either sign, most of them subnormal in float32."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, VOCAB, generator=generator, dtype=torch.float64)
    return (LEAST_NORMAL / 8 * noise).to(dtype)


def kinds(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Aligned and base logits whose 100th largest difference, or x, is next to 0, among entries far below."""
    zero, tiny = torch.zeros(2, VOCAB, dtype=dtype), tiny_numbers(2, dtype)
    below, above = zero.clone(), zero.clone()
    below[:, 1::2] = -150.0  # half of the entries have no mass in float
    above[:, ::60] = 3.0  # fewer than 100
    return {
        "tiny": (zero, tiny),
        "below": (zero, tiny + below),
        "above and below": (below, below + above + tiny),
        "shifted": (tiny, tiny_numbers(2, dtype, seed=1)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top", [1, 49, 51, 100, 1600, VOCAB])
def test_the_largest_differences_are_found_next_to_0(top: int, dtype: torch.dtype) -> None:
    for name, (aligned, base) in kinds(dtype).items():
        difference = base.float() - aligned.float()
        assert bool(((difference != 0) & (difference.abs() < LEAST_NORMAL)).any()), name
        expected = largest(difference.double(), top)
        favored = base_favored_tokens(aligned, base, top_k=top, implementation="cpu")
        assert torch.equal(favored.indices, expected), name
        assert torch.equal(favored.differences, difference.gather(-1, expected)), name
        statistics = position_statistics(aligned, base, top_n=10, top_k=top, implementation="cpu")
        assert torch.equal(statistics.favored_tokens, expected), name
        config = CompletionLossConfig(top_k=top)
        student = torch.linspace(-200, 5, VOCAB).expand(2, -1).to(dtype)
        options = {"config": config, "implementation": "cpu", "reduction": "none"}
        forward = fused_completion_loss(student, aligned, base, **options)
        output, _ = loss_and_gradient(student, aligned, base, **options)
        for left, right in zip(forward, output, strict=True):
            assert torch.equal(left, right), name
        assert torch.equal(output.top_k_indices, expected), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_count_next_to_0_is_the_references(dtype: torch.dtype) -> None:
    """lse(b) - lse(a) is 0 or subnormal, and where a model is the other but for a shift, no entry is above it."""
    tiny = tiny_numbers(2, dtype)
    for aligned, base in ((tiny, tiny), (torch.zeros_like(tiny), torch.full_like(tiny, 1e-40))):
        for top in (1, 100):
            favored = base_favored_tokens(aligned, base, top_k=top, implementation="cpu")
            assert favored.count.tolist() == [0, 0]
            config = CompletionLossConfig(top_k=top)
            output, _ = loss_and_gradient(aligned, aligned, base, config=config, implementation="cpu")
            assert output.base_favored_count.tolist() == [0, 0]


FILTERS = ({}, {"top_k": 60}, {"top_k": 1300}, {"top_k": 2500}, {"top_p": 0.3}, {"min_p": 0.04})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_sampler_orders_what_is_next_to_0(filters: dict[str, float], dtype: torch.dtype) -> None:
    """One entry of the aligned model moves the threshold down to where no rounding matters."""
    uniforms = torch.rand(2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    far = torch.where(torch.arange(VOCAB) % 2 == 0, -150.0, 0.0).to(dtype)  # half of the entries have no mass in float
    for aligned, base in (kinds(dtype)["shifted"], [model + far for model in kinds(dtype)["shifted"]]):
        aligned[:, 5] = 3.0
        x = contrastive_logits(aligned, base, alpha=1.0)
        assert int(((x != 0) & (x.abs() < LEAST_NORMAL)).sum()) > VOCAB // 2
        options = {"alpha": 1.0, "uniforms": uniforms, **filters}
        found, expected = (
            contrastive_sample(aligned, base, **options, implementation=name) for name in ("cpu", "reference")
        )
        assert torch.equal(found.token_ids, expected.token_ids)
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("temperature", "spread"), [(0.5, 50), (1.0, 150), (2.0, 400)])
def test_rows_of_which_most_entries_have_no_mass_in_float(temperature: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    models = [spread * (torch.rand(4, 5000, generator=generator) - 0.5) for _ in range(3)]
    for direction in ("student_teacher", "teacher_student"):
        config = CompletionLossConfig(top_k=100, temperature=temperature, kl_direction=direction)
        # the teacher is rounded to a float
        check_against_wide_rows(*models, config, gradient_rounding=spread * 2.0**-22)


def test_entries_without_mass_in_float_are_not_drawn() -> None:
    aligned = torch.linspace(-600, 0, VOCAB)[None]
    x = contrastive_logits(aligned, aligned, alpha=1.0)
    for temperature, filters in itertools.product((1.0, 0.5), ({}, {"top_p": 0.9}, {"min_p": 1e-3})):
        for uniform in (0.25, 0.5, 1 - 2.0**-24):
            options = {"alpha": 1.0, "temperature": temperature, "uniforms": torch.tensor([uniform]), **filters}
            left, right = (
                contrastive_sample(aligned, aligned, **options, implementation=name) for name in ("cpu", "reference")
            )
            assert torch.equal(left.token_ids, right.token_ids)
            assert float(x[0, left.token_ids]) > -200 * temperature


def test_kernels_leave_the_processors_rounding_as_it_was() -> None:
    """In every thread: a product next to 0 afterwards is what it was."""
    factor = torch.full((1 << 16,), 1e-30)
    before = factor * 1e-10
    assert bool((before > 0).all())
    aligned, base = torch.randn(2, 3, 70000, generator=torch.Generator().manual_seed(0)).unbind()
    loss_and_gradient(aligned, aligned, base, implementation="cpu")
    position_statistics(aligned, base, implementation="cpu")
    for filters in ({"top_k": 50}, {"top_p": 0.9}, {}):
        contrastive_sample(aligned, base, alpha=1.0, implementation="cpu", **filters)
    assert torch.equal(factor * 1e-10, before)

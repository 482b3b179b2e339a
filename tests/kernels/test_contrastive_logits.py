"""Eq. 7 against a plain loop over the vocabulary."""

import math

import pytest
import torch

from deepalign.kernels.contrastive_sample import contrastive_logits
from tests.kernels.oracle import softmax_logs
from tests.kernels.samples import three_models

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("space", ["logits", "logprobs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 4096])
def test_against_float64(vocab: int, dtype: torch.dtype, space: str) -> None:
    _, aligned, base = three_models(3, vocab, dtype=dtype)
    result = contrastive_logits(aligned, base, alpha=0.8, space=space)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for n in range(3):
        a, b = aligned[n].double(), base[n].double()
        excess = softmax_logs(b) - softmax_logs(a)
        amount = (b - a).clamp(min=0.0) if space == "logits" else excess
        expected = [float(a[v] - 0.8 * amount[v] if excess[v] > 0 else a[v]) for v in range(vocab)]
        # an entry within rounding of the threshold may fall on either side, where "logits" takes off a finite amount
        clear = excess.abs() > 1e-5
        torch.testing.assert_close(
            result[n].double()[clear], torch.tensor(expected).double()[clear], rtol=1e-6, atol=2e-5
        )


def test_spaces_differ_by_the_partitions() -> None:
    """With b = a + 5 the base model favors nothing; raise one entry more and only that one is lowered."""
    aligned = torch.zeros(1, 8)
    base = torch.full((1, 8), 5.0)
    base[0, 2] = 7.0
    threshold = 5.0 + math.log((7 + math.exp(2)) / 8)
    logits = contrastive_logits(aligned, base, alpha=2.0)
    logprobs = contrastive_logits(aligned, base, alpha=2.0, space="logprobs")
    for result, amount in ((logits, 7.0), (logprobs, 7.0 - threshold)):
        assert float(result[0, 2]) == pytest.approx(-2.0 * amount, rel=1e-6)
        assert result[0, [0, 1, 3, 4, 5, 6, 7]].tolist() == [0.0] * 7


def test_favored_entries_with_a_negative_difference_stay_in_logit_space() -> None:
    """Favored by log-probability although b < a: max(b - a, 0) takes nothing off, the log-probability excess does."""
    aligned = torch.zeros(1, 8)
    base = torch.full((1, 8), -5.0)
    base[0, 2] = -1.0
    assert torch.equal(contrastive_logits(aligned, base, alpha=1.0), aligned)
    assert float(contrastive_logits(aligned, base, alpha=1.0, space="logprobs")[0, 2]) < -1.0


@pytest.mark.parametrize("space", ["logits", "logprobs"])
def test_an_empty_set_and_alpha_zero_leave_aligned_untouched(space: str) -> None:
    _, aligned, base = three_models(4, 1000, dtype=torch.bfloat16)
    same = aligned.t().contiguous().t()
    assert torch.equal(contrastive_logits(aligned, same, alpha=3.0, space=space), aligned.float())
    assert torch.equal(contrastive_logits(aligned, base, alpha=0.0, space=space), aligned.float())


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("where", [0, 1])
def test_exceptional_rows_and_padding(where: int, value: float) -> None:
    models = three_models(3, 40)[1:]
    clean = contrastive_logits(*(model[:, :36].contiguous() for model in models), alpha=1.0)
    holes = torch.tensor([2, 30])
    kept = torch.tensor([v for v in range(36) if v not in (2, 30)])
    dense = contrastive_logits(*(model[2:, kept] for model in models), alpha=1.0)
    for model in models:
        model[:, 36:] = NAN
        model[2, holes] = -INF
    models[where][1, 7] = value
    result = contrastive_logits(*models, alpha=1.0, vocab_size=36)
    assert result.shape == (3, 40)
    assert torch.equal(result[:, 36:], torch.full((3, 4), -INF))
    torch.testing.assert_close(result[0, :36], clean[0])
    assert bool(result[1, :36].isnan().all())
    assert result[2, holes].tolist() == [-INF, -INF]
    torch.testing.assert_close(result[2:, kept], dense)


def test_a_row_without_any_entry_is_bad() -> None:
    empty = torch.full((1, 5), -INF)
    assert bool(contrastive_logits(empty, empty, alpha=1.0).isnan().all())


def test_shapes_and_gradient() -> None:
    assert contrastive_logits(torch.zeros(5), torch.zeros(5), alpha=1.0).shape == (5,)
    assert contrastive_logits(torch.zeros(0, 5), torch.zeros(0, 5), alpha=1.0).shape == (0, 5)
    aligned = torch.zeros(2, 5, requires_grad=True)
    assert not contrastive_logits(aligned, torch.zeros(2, 5), alpha=1.0).requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha is -1.0; expected a finite number >= 0"),
        ({"alpha": NAN}, ValueError, "alpha is nan"),
        ({"alpha": "1"}, TypeError, "alpha is '1'"),
        ({"alpha": 1.0, "space": "probs"}, ValueError, "space is 'probs'; expected one of 'logits', 'logprobs'"),
        ({"alpha": 1.0, "space": None}, TypeError, "space is None"),
        ({"alpha": 1.0, "vocab_size": 6}, ValueError, "vocab_size is 6 but the logits are 5 wide"),
    ],
    ids=str,
)
def test_refuses(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        contrastive_logits(torch.zeros(2, 5), torch.zeros(2, 5), **options)

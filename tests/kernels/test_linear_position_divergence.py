"""Position statistics from hidden states against those of materialised logits."""

import pytest
import torch
from torch import Tensor

from deepalign.kernels.position_divergence import IMPLEMENTATIONS, linear_position_divergence, position_divergence
from tests.kernels.linear_helpers import linear_models

RUNNABLE = [name for name, found in IMPLEMENTATIONS.items() if not isinstance(found, str)]
RUNNABLE = [name for name in RUNNABLE if name in ("reference", "cpu")]
each_implementation = pytest.mark.parametrize("implementation", RUNNABLE)


def materialised(
    models: tuple[Tensor, ...], *, vocab_size: int | None, softcap: float | None, scale: float, top_n: int
) -> object:
    logits = []
    for hidden, head in (models[:2], models[2:]):
        values = scale * hidden.double() @ head[:vocab_size].double().t()
        logits.append(values if softcap is None else softcap * torch.tanh(values / softcap))
    return position_divergence(*logits, top_n=top_n, implementation="reference")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab_size", "softcap", "scale", "chunk_rows"),
    [((11,), None, None, 1.0, 4), ((2, 5), 251, 5.0, 0.6, None), ((), 200, None, 2.0, 1), ((3,), None, 4.0, 1.0, 3)],
)
@each_implementation
def test_against_materialised_logits(
    implementation: str,
    rows: tuple[int, ...],
    vocab_size: int | None,
    softcap: float | None,
    scale: float,
    chunk_rows: int | None,
    dtype: torch.dtype,
) -> None:
    if dtype == torch.float64 and implementation != "reference":
        pytest.skip("compiled kernels take no float64")
    widths = (251, 260, 270) if vocab_size else (257, 257, 257)
    models = linear_models(*rows, sizes=(8, 40, 48), widths=widths, dtype=dtype)[2:]
    found = linear_position_divergence(
        *models,
        top_n=20,
        vocab_size=vocab_size,
        chunk_rows=chunk_rows,
        logit_softcap=softcap,
        logit_scale=scale,
        implementation=implementation,
    )
    expected = materialised(models, vocab_size=vocab_size, softcap=softcap, scale=scale, top_n=20)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for name in ("kl", "reverse_kl", "jsd", "top_overlap"):
        actual = getattr(found, name)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(actual.double(), getattr(expected, name), rtol=tolerance, atol=tolerance)
    assert torch.equal(found.favored_count, expected.favored_count)
    assert torch.equal(found.favored_in_top, expected.favored_in_top)


def test_bfloat16_logits_would_be_too_coarse() -> None:
    models = linear_models(16, vocab=2000, dtype=torch.bfloat16)[2:]
    expected = materialised(models, vocab_size=None, softcap=None, scale=1.0, top_n=100)
    coarse = position_divergence(models[0] @ models[1].t(), models[2] @ models[3].t())
    ours, theirs = (
        float((found.kl.double() - expected.kl).abs().max()) for found in (linear_position_divergence(*models), coarse)
    )
    assert ours < 0.1 * theirs


def test_autocast_compile_and_no_gradient() -> None:
    models = [tensor.requires_grad_() for tensor in linear_models(5)[2:]]
    expected = linear_position_divergence(*(tensor.detach().bfloat16() for tensor in models))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_position_divergence(*models)
        compiled = torch.compile(linear_position_divergence, fullgraph=True, backend="aot_eager")(*models)
    for one, two, wanted in zip(found, compiled, expected, strict=True):
        assert torch.equal(one, wanted)
        torch.testing.assert_close(two, wanted)
        assert not one.requires_grad
    arguments = (*(tensor.detach() for tensor in models), 100, 300, 2, None, 1.0, RUNNABLE[-1])
    torch.library.opcheck(torch.ops.deepalign.linear_position_divergence.default, arguments)


def test_no_rows_and_what_is_refused() -> None:
    models = linear_models(0)[2:]
    assert {statistic.shape for statistic in linear_position_divergence(*models)} == {(0,)}
    models = linear_models(3)[2:]
    with pytest.raises(ValueError, match="top_n is 301"):
        linear_position_divergence(*models, top_n=301)
    with pytest.raises(ValueError, match="base_hidden has shape"):
        linear_position_divergence(*models[:2], models[2][:, 1:], models[3])
    with pytest.raises(TypeError, match="aligned_hidden is a NoneType"):
        linear_position_divergence(None, *models[1:])

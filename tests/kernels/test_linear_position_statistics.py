"""All statistics of a row from hidden states against those of materialised logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deepalign.kernels.contrastive_sample import contrastive_logits
from deepalign.kernels.position_divergence import (
    IMPLEMENTATIONS,
    PositionDivergence,
    PositionStatistics,
    linear,
    linear_position_divergence,
    linear_position_statistics,
    position_statistics,
)
from tests.kernels.linear_helpers import linear_models

RUNNABLE = [name for name in ("reference", "cpu") if not isinstance(IMPLEMENTATIONS[name], str)]
each_implementation = pytest.mark.parametrize("implementation", RUNNABLE)
SOFTCAPS, SCALES = (5.0, None), (0.6, 0.25)


def float64_logits(hidden: Tensor, head: Tensor, softcap: float | None, scale: float, vocab_size: int) -> Tensor:
    logits = scale * hidden.double() @ head[:vocab_size].double().t()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def check(found: PositionStatistics, expected: PositionStatistics, tolerance: float) -> None:
    for name, ours, wanted in zip(PositionStatistics._fields, found, expected, strict=True):
        if wanted.dtype == torch.int64:
            assert torch.equal(ours, wanted), name
        else:
            torch.testing.assert_close(ours.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("contrast", [None, (1.5, "logits"), (0.5, "logprobs")])
@each_implementation
def test_against_materialised_logits(implementation: str, contrast: tuple | None, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and implementation != "reference":
        pytest.skip("compiled kernels take no float64")
    models = linear_models(11, sizes=(8, 40, 48), widths=(251, 260, 270), dtype=dtype)[2:]
    aligned, base = (float64_logits(*models[2 * m : 2 * m + 2], SOFTCAPS[m], SCALES[m], 251) for m in (0, 1))
    if contrast is not None:
        aligned = contrastive_logits(aligned, base, alpha=contrast[0], space=contrast[1])
    expected = position_statistics(aligned, base, top_n=20, top_k=7, implementation="reference")
    found = linear_position_statistics(
        *models,
        top_n=20,
        top_k=7,
        vocab_size=251,
        chunk_rows=4,
        logit_softcaps=SOFTCAPS,
        logit_scales=SCALES,
        contrast=contrast,
        implementation=implementation,
    )
    assert found.kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(found, expected, 1e-11 if dtype == torch.float64 else 4e-5)


@each_implementation
def test_neither_chunks_nor_blocks_change_a_row(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = linear_models(11, dtype=torch.bfloat16)[2:]
    whole = linear_position_statistics(*models, top_n=20, top_k=7, implementation=implementation)
    divergence = linear_position_divergence(*models, top_n=20, implementation=implementation)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(divergence, whole, strict=False))
    monkeypatch.setattr(linear, "CPU_BLOCK_ELEMENTS", 1)  # as few rows as threads allow
    for chunk_rows in (1, 3, 5, 11, 100):
        parts = linear_position_statistics(
            *models, top_n=20, top_k=7, chunk_rows=chunk_rows, implementation=implementation
        )
        check(parts, PositionStatistics(*(w if w.dtype == torch.int64 else w.double() for w in whole)), 1e-6)


@pytest.mark.parametrize("op", [linear_position_divergence, linear_position_statistics])
def test_kernels_get_rows_that_stay_in_cache(op: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    reference = IMPLEMENTATIONS["reference"]
    assert not isinstance(reference, str)
    seen = []

    def measured(aligned: Tensor, *rest: Any) -> PositionDivergence:
        seen.append(len(aligned))
        return reference.position_divergence(aligned, *rest)

    monkeypatch.setitem(IMPLEMENTATIONS, "reference", reference._replace(position_divergence=measured))
    monkeypatch.setattr(linear, "CPU_BLOCK_ELEMENTS", 300 * 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    op(*linear_models(11)[2:], chunk_rows=6, implementation="reference")
    assert seen == [4, 2, 4, 1]


def test_no_base_favored_tokens_no_rows_and_any_shape() -> None:
    models = linear_models(2, 3)[2:]
    found = linear_position_statistics(*models, top_n=20, top_k=0)
    assert found.favored_tokens.shape == (2, 3, 0)
    assert found.favored_in_base_top.shape == (2, 3)
    flat = linear_position_statistics(*(m.reshape(-1, m.shape[-1]) for m in models), top_n=20, top_k=5)
    assert torch.equal(found.favored_in_base_top.flatten(), flat.favored_in_base_top)
    empty = linear_position_statistics(*linear_models(0)[2:], top_n=20, top_k=5)
    assert [tuple(values.shape) for values in empty] == [(0,)] * 7 + [(0, 5)]


def test_a_bad_row_harms_no_other() -> None:
    models = list(linear_models(5)[2:])
    expected = linear_position_statistics(*models, top_n=20, top_k=5)
    models[2] = models[2].clone()
    models[2][1], models[2][3] = torch.nan, torch.inf
    found = linear_position_statistics(*models, top_n=20, top_k=5)
    assert found.kl.isnan().tolist() == [False, True, False, True, False]
    assert found.favored_count[[1, 3]].tolist() == found.favored_in_base_top[[1, 3]].tolist() == [0, 0]
    assert (found.favored_tokens[[1, 3]] == -1).all()
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours[[0, 2, 4]], wanted[[0, 2, 4]])


def test_autocast_compile_and_opcheck() -> None:
    models = [tensor.requires_grad_() for tensor in linear_models(5)[2:]]
    expected = linear_position_statistics(*(tensor.detach().bfloat16() for tensor in models))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_position_statistics(*models)
        compiled = torch.compile(linear_position_statistics, fullgraph=True, backend="aot_eager")(*models)
    for one, two, wanted in zip(found, compiled, expected, strict=True):
        assert torch.equal(one, wanted)
        torch.testing.assert_close(two, wanted)
        assert not one.requires_grad
    matrices = tuple(tensor.detach() for tensor in models)
    arguments = (*matrices, 20, 7, 300, 2, 5.0, 1.0, None, 0.5, 1.5, "logits", RUNNABLE[-1])
    torch.library.opcheck(torch.ops.deepalign.linear_position_statistics.default, arguments)


def test_what_is_refused() -> None:
    models = linear_models(3)[2:]
    for bad, error, message in (
        ({"top_k": 301}, ValueError, "top_k is 301"),
        ({"top_k": -1}, ValueError, "top_k is -1"),
        ({"top_n": 0}, ValueError, "top_n is 0"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows is 0"),
        ({"logit_softcaps": (None, -1.0)}, ValueError, "logit_softcap"),
        ({"logit_softcaps": 5.0}, TypeError, "logit_softcaps is 5.0, a float; expected a tuple"),
        ({"logit_scales": (1.0,)}, ValueError, "logit_scales is .*expected two"),
        ({"contrast": (-1.0, "logits")}, ValueError, "alpha"),
        ({"contrast": (1.0, "bits")}, ValueError, "space is 'bits'"),
        ({"contrast": 2.0}, TypeError, "contrast is 2.0"),
    ):
        with pytest.raises(error, match=message):
            linear_position_statistics(*models, **bad)
    with pytest.raises(ValueError, match="base_hidden has shape"):
        linear_position_statistics(*models[:2], models[2][:, 1:], models[3])

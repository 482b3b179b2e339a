"""`measure_rows` against float64, one row at a time."""

import dataclasses

import pytest
import torch

from deepalign.diagnose.rows import STATISTICS, ModelRows, RowOptions, measure_rows
from deepalign.kernels.position_divergence import IMPLEMENTATIONS, linear_position_divergence
from deepalign.output_head import OutputHead
from tests.diagnose import oracle
from tests.sampling.stepwise import eq7

SERVING = [name for name, found in IMPLEMENTATIONS.items() if not isinstance(found, str) and name != "triton"]
ROWS, VOCAB, TOP_N, TOP_K = 5, 300, 20, 7


def pair(dtype=torch.float64, vocab=VOCAB, *, rows=ROWS, softcap=None, scale=1.0) -> tuple[ModelRows, ModelRows]:
    """Two models of unequal hidden sizes whose logits are peaked and related."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=generator, dtype=torch.float64)
    lm_head = torch.randn(vocab, 16, generator=generator, dtype=torch.float64)
    more = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    wider = torch.cat([lm_head, 0.4 * torch.randn(vocab, 8, generator=generator, dtype=torch.float64)], dim=1)
    pairs = ((hidden, lm_head), (torch.cat([hidden, more], dim=1), wider))
    first, second = (ModelRows(h.to(dtype), OutputHead(w.to(dtype), softcap, scale)) for h, w in pairs)
    return first, second


def float64_logits(rows: ModelRows) -> torch.Tensor:
    head = rows.head
    return dataclasses.replace(head, lm_head=head.lm_head.double()).logits(rows.hidden_NH.double())


def check(found, aligned_NV, base_NV, options, tolerance):
    for n, (a_V, b_V) in enumerate(zip(aligned_NV, base_NV, strict=True)):
        expected = oracle.statistics(a_V, b_V, options.top_n)
        for name in STATISTICS:
            assert float(getattr(found, name)[n]) == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
        assert found.favored_tokens[n].tolist() == oracle.favored_tokens(a_V, b_V, options.top_k)


@pytest.mark.parametrize("implementation", SERVING)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (8.0, 0.5)])
def test_every_statistic_equals_float64(implementation, softcap, scale):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        if dtype == torch.float64 and implementation != "reference":
            continue
        first, second = pair(dtype, softcap=softcap, scale=scale)
        options = RowOptions(TOP_N, TOP_K, implementation=implementation)
        check(measure_rows(first, second, options), *map(float64_logits, (first, second)), options, tolerance)


def test_half_precision_rows_are_differenced_in_float32():
    first, second = pair(torch.bfloat16)
    options = RowOptions(TOP_N, TOP_K)
    check(measure_rows(first, second, options), *map(float64_logits, (first, second)), options, 1e-4)


@pytest.mark.parametrize("space", ["logits", "logprobs"])
def test_contrastive_rows_equal_float64(space):
    first, second = pair()
    options = RowOptions(TOP_N, TOP_K, contrast=(1.5, space))
    aligned_NV, base_NV = map(float64_logits, (first, second))
    contrasted_NV = torch.stack([eq7(a, b, 1.5, space) for a, b in zip(aligned_NV, base_NV, strict=True)])
    check(measure_rows(first, second, options), contrasted_NV, base_NV, options, 1e-9)


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 100])
def test_chunks_change_nothing(chunk_rows):
    first, second = pair(torch.float32)
    whole = measure_rows(first, second, RowOptions(TOP_N, TOP_K))
    parts = measure_rows(first, second, RowOptions(TOP_N, TOP_K, chunk_rows=chunk_rows))
    for left, right in zip(whole, parts, strict=True):
        assert torch.allclose(left, right, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_linear_op():
    first, second = pair(torch.float32)
    found = measure_rows(first, second, RowOptions(TOP_N, 0))
    op = linear_position_divergence(
        first.hidden_NH, first.head.lm_head, second.hidden_NH, second.head.lm_head, top_n=TOP_N
    )
    for left, right in zip(op, found[:6], strict=True):
        assert torch.allclose(left, right, rtol=1e-6, atol=1e-7)
    assert found.favored_tokens.shape == (ROWS, 0)


def test_padding_does_not_exist_and_heads_may_differ_in_width():
    first, second = pair(torch.float64)
    wider = second._replace(head=OutputHead(torch.cat([second.head.lm_head, 100 * second.head.lm_head])))
    options = RowOptions(TOP_N, TOP_K, vocab_size=VOCAB - 3)
    found = measure_rows(first, wider, options)
    logits = (float64_logits(rows)[:, : VOCAB - 3] for rows in (first, second))
    check(found, *logits, options, 1e-10)
    assert measure_rows(first, wider, RowOptions(TOP_N, TOP_K)).favored_count.max() <= VOCAB


@pytest.mark.parametrize("implementation", SERVING)
def test_a_model_favors_nothing_over_itself(implementation):
    first, _ = pair(torch.float32)
    found = measure_rows(first, first, RowOptions(TOP_N, TOP_K, implementation=implementation))
    for name in ("favored_count", "favored_in_top", "favored_in_base_top"):
        assert getattr(found, name).tolist() == [0] * ROWS
    assert found.kl.abs().max() < 1e-6


def test_a_bad_row_counts_nothing_and_harms_no_other():
    first, second = pair(torch.float32)
    hidden = first.hidden_NH.clone()
    hidden[1] = torch.nan
    found = measure_rows(first._replace(hidden_NH=hidden), second, RowOptions(TOP_N, TOP_K))
    expected = measure_rows(first, second, RowOptions(TOP_N, TOP_K))
    assert found.kl.isnan().tolist() == [False, True, False, False, False]
    assert found.favored_in_base_top[1] == found.favored_in_top[1] == found.favored_count[1] == 0
    assert found.favored_tokens[1].tolist() == [-1] * TOP_K
    rest = [0, 2, 3, 4]
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left[rest], right[rest])


def test_no_rows_give_no_statistics():
    first, second = pair(torch.float32, rows=0)
    assert all(len(values) == 0 for values in measure_rows(first, second, RowOptions(TOP_N, TOP_K)))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="top_n must be at least 1"):
        RowOptions(top_n=0)
    with pytest.raises(TypeError, match="top_k"):
        RowOptions(top_k=2.0)  # type: ignore[arg-type]
    first, second = pair(torch.float32)
    with pytest.raises(ValueError, match="rows"):
        measure_rows(first, second._replace(hidden_NH=second.hidden_NH[:2]), RowOptions(TOP_N))


@pytest.mark.gpu
@pytest.mark.parametrize("contrast", [None, (1.5, "logits")])
def test_a_gpu_says_what_the_cpu_says(contrast):
    models = pair(torch.bfloat16, vocab=4096)
    on_gpu = [ModelRows(m.hidden_NH.cuda(), dataclasses.replace(m.head, lm_head=m.head.lm_head.cuda())) for m in models]
    options = RowOptions(TOP_N, TOP_K, contrast=contrast)
    for left, right in zip(measure_rows(*on_gpu, options), measure_rows(*models, options), strict=True):
        assert torch.allclose(left.cpu(), right, rtol=1e-3, atol=1e-4)

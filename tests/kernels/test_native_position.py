"""The CPU kernels of the position statistics over every width, layout, tie and number of threads, against float64."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.position_divergence import base_favored_tokens, position_divergence
from tests.kernels.loss_helpers import needs_native
from tests.kernels.samples import largest, three_models
from tests.kernels.test_native_loss import EDGES, LAYOUTS, VOCABULARIES, orders

pytestmark = needs_native
NAN, INF = math.nan, math.inf
CPU = {"implementation": "cpu"}
each_dtype = pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)


@pytest.fixture(autouse=True)
def restored_threads_and_poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def two_models(*shape: int, dtype: torch.dtype = torch.float32, peaked: bool = True, seed: int = 0) -> list[Tensor]:
    return three_models(*shape, dtype=dtype, peaked=peaked, seed=seed)[1:]


def check_rows(aligned: Tensor, base: Tensor, top: int, tolerance: float = 2e-6) -> None:
    """Finite rows (N, V) through both ops: errors within tolerance (1 + |value|), selections exact."""
    a, b = aligned.double(), base.double()
    d = (base.float() - aligned.float()).double()
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    threshold = b.logsumexp(-1, keepdim=True) - a.logsumexp(-1, keepdim=True)
    slack = 2e-6 * (1 + torch.maximum(a.abs(), b.abs()).amax(-1, keepdim=True))
    slack = torch.where((aligned == base).all(-1, keepdim=True), 0.0, slack)
    top_a, top_b = largest(a, top), largest(b, top)
    members = [torch.zeros(a.shape, dtype=torch.bool).scatter(-1, chosen, True) for chosen in (top_a, top_b)]
    shared = (members[0] & members[1]).sum(-1)

    result = position_divergence(aligned, base, top_n=top, **CPU)
    expected = {
        "kl": (p * (log_p - log_q)).sum(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "jsd": 0.5 * ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)),
    }
    for name, value in expected.items():
        error = ((getattr(result, name).double() - value).abs() / (1 + value.abs())).max()
        assert float(error) <= tolerance, f"{name} is off by {float(error):.2e} (1 + |value|)"
    torch.testing.assert_close(result.top_overlap.double(), shared.double() / top, rtol=1e-6, atol=0)
    favored = base_favored_tokens(aligned, base, top_k=top, **CPU)
    assert torch.equal(favored.indices, largest(d, top))
    assert torch.equal(favored.differences.double(), d.gather(-1, favored.indices))
    assert torch.equal(favored.count, result.favored_count)
    for count, values in ((favored.count, d), (result.favored_in_top, d.gather(-1, top_a))):
        assert bool((count >= (values > threshold + slack).sum(-1)).all())
        assert bool((count <= (values > threshold - slack).sum(-1)).all())


@each_dtype
@pytest.mark.parametrize(("rows", "vocab"), VOCABULARIES)
def test_vocabularies(rows: int, vocab: int, dtype: torch.dtype) -> None:
    check_rows(*two_models(rows, vocab, dtype=dtype, seed=vocab), min(100, vocab))


def test_a_vocabulary_of_2_to_the_20() -> None:
    check_rows(*two_models(1, 2**20, dtype=torch.bfloat16), 100)


@each_dtype
def test_every_width(dtype: torch.dtype) -> None:
    for vocab in (*range(1, 70), *EDGES, 16383, 16384, 16385, 32801):
        check_rows(*two_models(2, vocab, dtype=dtype, peaked=vocab % 2 == 0, seed=vocab), min(3, vocab))


@pytest.mark.parametrize("vocab", [1, 7, 33, 600, 4097, 40000])
def test_selections_of_every_size(vocab: int) -> None:
    models = two_models(2, vocab, peaked=False)
    for top in {1, min(2, vocab), max(1, vocab // 3), max(1, vocab - 1), vocab}:
        check_rows(*models, top)


@each_dtype
def test_ties_in_every_number(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for vocab, values, top in itertools.product((50, 1111, 40000), (1, 2, 9), (1, 40, 600)):
        if top <= vocab:
            aligned = torch.randint(-2, 3, (2, vocab), generator=generator).to(dtype)
            check_rows(aligned, aligned + torch.randint(values, (2, vocab), generator=generator).to(dtype), top)


@pytest.mark.parametrize("name", orders(1))
def test_orders_that_defeat_bounds(name: str) -> None:
    base = orders(20001)[name].expand(2, -1)
    for top in (1, 100, 2000):
        check_rows(torch.zeros_like(base), base, top)
        check_rows(base, torch.zeros_like(base), top)


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts_give_the_same_bits(layout: Any, dtype: torch.dtype) -> None:
    models = two_models(3, 1030, dtype=dtype)
    for operation in (position_divergence, base_favored_tokens):
        expected = operation(*models, **CPU)
        for left, right in zip(operation(*(layout(model) for model in models), **CPU), expected, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_threads_and_batch_do_not_matter(rows: int) -> None:
    models = two_models(rows, 70001, dtype=torch.bfloat16)
    models[0][0, ::5] = models[1][0, ::5] = -INF
    models[1][-1, 60000] += 300.0  # far above what the first entries promise
    tied = [torch.zeros(1, 70001), (torch.arange(70001) % 3 == 0).float()[None]]
    for inputs, options in ((models, {"top_k": 100}), (models, {"top_k": 7000}), (tied, {"top_k": 5000})):
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(base_favored_tokens(*inputs, **options, **CPU))
            results[-1] += position_divergence(*inputs, top_n=options["top_k"], **CPU)
        for result in results[1:]:
            assert all(torch.equal(left, right) for left, right in zip(result, results[0], strict=True))
        last = tuple(model[-1] for model in inputs)
        alone = base_favored_tokens(*last, **options, **CPU) + position_divergence(*last, top_n=options["top_k"], **CPU)
        assert all(torch.equal(left, right[-1]) for left, right in zip(alone, results[0], strict=True))


@each_dtype
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("where", [0, 1])
def test_a_bad_entry_anywhere_spoils_its_row_only(where: int, value: float, dtype: torch.dtype) -> None:
    for width, vocab in ((9, 9), (77, 70), (1100, 1099)):
        models = two_models(3, width, dtype=dtype)
        clean = base_favored_tokens(*models, top_k=5, vocab_size=vocab, **CPU)
        clean += position_divergence(*models, top_n=5, vocab_size=vocab, **CPU)
        for position in (0, vocab // 2, vocab - 1):
            spoiled = [model.clone() for model in models]
            spoiled[where][1, position] = value
            favored = base_favored_tokens(*spoiled, top_k=5, vocab_size=vocab, **CPU)
            divergence = position_divergence(*spoiled, top_n=5, vocab_size=vocab, **CPU)
            assert favored.indices[1].tolist() == [-1] * 5
            assert bool(favored.differences[1].isnan().all())
            assert all(bool(statistic[1].isnan()) for statistic in divergence[:4])
            assert [int(count[1]) for count in (favored.count, *divergence[4:])] == [0, 0, 0]
            for left, right in zip(favored + divergence, clean, strict=True):
                assert torch.equal(left[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize("absent", [slice(0, 64), slice(0, 1), slice(1090, 1099), slice(3, 1099), slice(0, 1099, 2)])
def test_absent_entries_are_as_if_cut_out(absent: slice) -> None:
    models = two_models(2, 1099, dtype=torch.bfloat16)
    for model in models:
        model[:, absent] = -INF
    kept = torch.isfinite(models[0][0]).nonzero().flatten()
    dense = [model[:, kept] for model in models]
    top = min(5, len(kept))
    check_rows(*dense, top)
    favored, expected = (base_favored_tokens(*pair, top_k=top, **CPU) for pair in (models, dense))
    assert torch.equal(favored.indices, kept[expected.indices])
    assert torch.equal(favored.count, expected.count)
    for left, right in zip(*(position_divergence(*pair, top_n=top, **CPU) for pair in (models, dense)), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("shift", [-3000.0, 100.0, 9000.0])
def test_shifts_and_large_logits(shift: float) -> None:
    """The spacing of floats at 9000 is 1e-3; a shift of one model leaves the distributions."""
    models = [(4 * model).round() / 4 for model in two_models(3, 700)]
    expected = position_divergence(*models, **CPU)
    for moved in ((models[0] + shift, models[1]), (models[0], models[1] + shift)):
        for left, right in zip(position_divergence(*moved, **CPU), expected, strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("vocab", [65, 1001])
def test_logits_near_the_largest_float(vocab: int) -> None:
    models = two_models(2, vocab)
    for model in models:
        model[0, vocab // 2] = 3e38
    result = position_divergence(*models, top_n=7, **CPU)
    assert [float(value[0]) for value in result[:3]] == [0.0, 0.0, 0.0]
    models[1][0, vocab // 2] = -3e38
    result = position_divergence(*models, top_n=7, **CPU)
    assert float(result.jsd[0]) == pytest.approx(math.log(2), rel=1e-6)
    assert float(result.kl[0]) > 1e38
    assert all(bool(torch.isfinite(value[1])) for value in result)


def test_no_rows() -> None:
    empty = torch.zeros(0, 500)
    assert [tuple(value.shape) for value in position_divergence(empty, empty, **CPU)] == [(0,)] * 6
    assert [tuple(value.shape) for value in base_favored_tokens(empty, empty, **CPU)] == [(0, 100), (0, 100), (0,)]


# ---- as torch.library ops

OPS = {"position_divergence": position_divergence, "base_favored_tokens": base_favored_tokens}


@pytest.mark.parametrize("name", OPS)
@each_dtype
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    models = two_models(3, 50, dtype=dtype)
    torch.library.opcheck(getattr(torch.ops.deepalign, name).default, (*models, 7, 45))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_compiles_without_a_graph_break(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    operation = OPS[name]
    compiled = torch.compile(
        lambda a, b: operation(2 * a, b, top_k=7, **CPU) if name[0] == "b" else operation(2 * a, b, top_n=7, **CPU),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    for rows, vocab in ((3, 60), (4, 61)):
        aligned, base = two_models(rows, vocab)
        options = {"top_k": 7} if name[0] == "b" else {"top_n": 7}
        for left, right in zip(compiled(aligned, base), operation(2 * aligned, base, **options, **CPU), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 50, dtype=torch.float64)}, "logits must be float32, bfloat16 or float16"),
        ({0: torch.zeros(50)}, "aligned must be"),
        ({1: torch.zeros(3, 49)}, "base differs in shape"),
        ({1: torch.zeros(3, 50).half()}, "base differs in dtype"),
        ({1: torch.zeros(50, 3).t()}, "base must have stride 1"),
        ({2: 0}, "must be in"),
        ({2: 51}, "must be in"),
        ({3: 0}, "vocab_size must be in"),
        ({3: 51}, "vocab_size must be in"),
    ],
)
def test_the_ops_themselves_read_nothing_out_of_bounds(name: str, change: dict[int, object], message: str) -> None:
    arguments: list[object] = [torch.zeros(3, 50), torch.zeros(3, 50), 5, 50]
    operation = getattr(torch.ops.deepalign, name)
    operation(*arguments)
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        operation(*arguments)

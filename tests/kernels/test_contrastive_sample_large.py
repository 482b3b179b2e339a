"""The sampler on vocabularies of many blocks: every way of finding what filters keep, threads, bad entries anywhere."""

import functools
import math

import pytest
import torch
from torch import Tensor

from deepalign.kernels.contrastive_sample import ContrastiveSample, contrastive_logits, contrastive_sample
from deepalign.kernels.library import WHY_NO_NATIVE
from tests.kernels.sampler_oracle import BELOW_ONE, RUNNABLE, check_sample, random_uniforms, two_models

VOCAB = 20011  # a prime: the last block is odd
PATTERNS = ("peaked", "flat", "equal", "ascending", "descending", "few_values", "masked", "huge", "lowered")
FILTERS = (
    {},
    {"top_k": 1},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 2048},
    {"top_k": 2049},
    {"top_k": VOCAB - 1, "top_p": 0.999},
    {"top_k": 7000, "top_p": 0.3, "min_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.9999, "min_p": 1e-3},
    {"top_p": 1e-7},
    {"min_p": 0.02},
    {"min_p": 1.0},
)

each_implementation = pytest.mark.parametrize("implementation", RUNNABLE)


@functools.cache
def models_like(pattern: str, dtype: torch.dtype) -> list[Tensor]:
    """Aligned and base logits of one row, (VOCAB,) each."""
    aligned, base = two_models(VOCAB, peaked=pattern != "flat")
    ramp = torch.linspace(-20, 5, VOCAB)
    if pattern == "equal":
        aligned, base = torch.full_like(aligned, 1.25), torch.full_like(base, -3.0)
    elif pattern in ("ascending", "descending"):
        aligned = base = ramp if pattern == "ascending" else ramp.flip(0)
    elif pattern == "few_values":
        aligned, base = aligned.div(8).round(), base.div(8).round()
    elif pattern == "masked":
        for model in (aligned, base):
            model[::3] = -math.inf
            model[:2000] = -math.inf
    elif pattern == "huge":
        aligned, base = 1e3 + 30 * aligned, 30 * base - 1e3
    elif pattern == "lowered":  # the largest of aligned's are far down in x
        base = torch.where(aligned > 5, aligned + 100, base)
    return [aligned.to(dtype), base.to(dtype)]


@functools.cache
def contrasted(pattern: str, dtype: torch.dtype, space: str) -> Tensor:
    return contrastive_logits(*models_like(pattern, dtype), alpha=0.75, space=space)


@functools.cache
def descending(x_V: Tensor) -> Tensor:
    return torch.where(x_V == 0, 0.0, x_V).sort(descending=True, stable=True).indices


def kept_weights(x_V: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """(V,) float64, the largest 1, and 0 for what the filters do not keep."""
    weight_V = ((x_V.double() - x_V.max().double()) / temperature).exp()
    order_V = descending(x_V)
    order_K = order_V[: top_k or len(x_V)]
    before_K = weight_V[order_K].cumsum(0) - weight_V[order_K]
    if top_p < 1:
        order_K = order_K[before_K < top_p * weight_V[order_K].sum() * (1 - 1e-15)]
    kept_V = torch.zeros_like(weight_V).scatter(0, order_K, weight_V[order_K])
    return torch.where(kept_V >= min_p, kept_V, 0.0)


def check_draws(result: ContrastiveSample, uniforms: Tensor, weight_V: Tensor, tolerance: float = 1e-5) -> None:
    """Hold draws from one row against the weights of what it keeps."""
    share_V = weight_V / weight_V.sum()
    cdf_V = share_V.cumsum(0)
    for uniform, token, logprob in zip(uniforms.tolist(), *map(Tensor.tolist, result), strict=True):
        share = float(share_V[token])
        assert share > 0, f"token {token} was not kept"
        assert logprob == pytest.approx(math.log(share), abs=tolerance)
        assert cdf_V[token] - share - tolerance <= uniform <= cdf_V[token] + tolerance


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@each_implementation
def test_what_is_kept_and_drawn(implementation: str, pattern: str, filters: dict[str, float]) -> None:
    dtype = {"masked": torch.float16, "huge": torch.float32, "equal": torch.float32}.get(pattern, torch.bfloat16)
    aligned, base = models_like(pattern, dtype)
    uniforms = torch.cat([random_uniforms(6), torch.tensor([0.0, BELOW_ONE], dtype=torch.float64)])
    for space, temperature in (("logits", 0.7), ("logprobs", 1.5)):
        rows = (model.expand(len(uniforms), -1) for model in (aligned, base))
        options = {"alpha": 0.75, "space": space, "implementation": implementation}
        result = contrastive_sample(*rows, uniforms=uniforms, temperature=temperature, **options, **filters)
        weight_V = kept_weights(contrasted(pattern, dtype, space), temperature, **filters)
        # x of logits near 1e5 is rounded to 1/128
        check_draws(result, uniforms, weight_V, tolerance=2e-2 if pattern == "huge" else 1e-5)


@pytest.mark.parametrize("top_p", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("top_k", [0, 100, 3000, 10000])
@each_implementation
def test_ties_are_kept_in_index_order(implementation: str, top_k: int, top_p: float) -> None:
    """Of equal entries exactly the first are kept, however many, and wherever they are."""
    logits = torch.full((VOCAB,), -1000.0)
    tied = torch.arange(5, VOCAB, 2)
    logits[tied] = 3.0
    uniforms = torch.tensor([0.0, 0.5, BELOW_ONE], dtype=torch.float64)
    rows = logits.expand(3, -1)
    options = {"top_k": top_k, "top_p": top_p, "implementation": implementation}
    result = contrastive_sample(rows, rows, alpha=1.0, uniforms=uniforms, **options)
    kept = math.ceil(top_p * min(top_k or len(tied), len(tied)))
    assert result.token_ids.tolist() == tied[[0, kept // 2, kept - 1]].tolist()
    assert result.logprobs.tolist() == pytest.approx([-math.log(kept)] * 3, rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 7, 300, 4000])
@each_implementation
def test_top_k_keeps_exactly_k_of_nearly_equal_entries(implementation: str, top_k: int) -> None:
    """At a temperature so high that all weights are 1, the log-probability counts what is kept."""
    for pattern in ("peaked", "ascending", "few_values"):
        aligned, base = models_like(pattern, torch.float32)
        result = contrastive_sample(
            aligned, base, alpha=1.0, temperature=1e9, top_k=top_k, implementation=implementation
        )
        assert float(result.logprobs) == pytest.approx(-math.log(top_k), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("implementation", [name for name in RUNNABLE if name != "reference"])
def test_the_number_of_threads_changes_nothing(implementation: str) -> None:
    models = two_models(5, 70001, dtype=torch.bfloat16)
    models[0][1, ::5] = models[1][1, ::5] = -math.inf
    uniforms, before = random_uniforms(5), torch.get_num_threads()
    filters = ({}, {"top_k": 50, "top_p": 0.9}, {"top_k": 4000}, {"top_p": 0.95}, {"min_p": 1e-3}, {"temperature": 0.0})

    def samples() -> list[list[Tensor]]:
        options = {"alpha": 0.9, "uniforms": uniforms, "implementation": implementation}
        return [list(contrastive_sample(*models, **options, **chosen)) for chosen in filters]

    try:
        torch.set_num_threads(1)
        expected = samples()
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for actual, wanted in zip(samples(), expected, strict=True):
                assert torch.equal(actual[0], wanted[0])
                assert torch.equal(actual[1], wanted[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", [0, 1])
@each_implementation
def test_a_bad_entry_anywhere_spoils_its_row_only(implementation: str, where: int, value: float) -> None:
    places = (0, 31, 32, 63, 64, 511, 512, 700, 1029, 1030)
    models = two_models(len(places) + 1, 1031, dtype=torch.bfloat16)
    for row, place in enumerate(places):
        models[where][row, place] = value
    for options in ({}, {"top_k": 20}, {"top_p": 0.9}, {"temperature": 0.0}):
        result = contrastive_sample(*models, alpha=0.5, implementation=implementation, **options)
        assert result.token_ids[:-1].tolist() == [-1] * len(places)
        assert bool(result.logprobs[:-1].isnan().all())
        assert 0 <= int(result.token_ids[-1]) < 1031
        assert float(result.logprobs[-1]) <= 0


@pytest.mark.parametrize("shift", [8.0, 1000.0])
@each_implementation
def test_a_shift_of_the_base_model_changes_nothing(implementation: str, shift: float) -> None:
    """Not even a bit: nothing is favored that was not, and nothing lowered by rounding."""
    aligned, _ = (model.mul(4).round() for model in two_models(4, 5000))
    options = {"uniforms": random_uniforms(4), "top_p": 0.9, "space": "logprobs", "implementation": implementation}
    expected = contrastive_sample(aligned, aligned, alpha=3.0, **options)
    shifted = contrastive_sample(aligned, aligned + shift, alpha=3.0, **options)
    assert torch.equal(shifted.token_ids, expected.token_ids)
    assert torch.equal(shifted.logprobs, expected.logprobs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@each_implementation
def test_entries_next_to_the_threshold(implementation: str, dtype: torch.dtype) -> None:
    """All but one are favored, by 1e-5, in rows whose exact sums are asked for at once: half of a row is large."""
    aligned = two_models(VOCAB)[0].mul(4).round().div(4)
    share_V = aligned.double().softmax(-1)
    alone = int((share_V.log() - math.log(1e-5)).abs().argmin())
    base = aligned + 8
    base[alone] -= 8
    assert bool(torch.equal(base.to(dtype).float(), base)), "this must be exact"
    rows = [model.to(dtype).expand(4, -1) for model in (aligned, base)]
    options = {"uniforms": random_uniforms(4), "top_k": 50, "implementation": implementation}
    assert contrastive_sample(*rows, alpha=4.0, **options).token_ids.tolist() == [alone] * 4


def models_around_the_threshold(gap: float) -> tuple[list[Tensor], Tensor]:
    """Aligned and base logits (VOCAB,), exact in bf16, and the mask of 24 large entries around the threshold.

    Half of these are above it, by `gap` and up to 0.006, half below. All others are 9 lower. Together they hold a tenth
    of the mass, each so little that a rough sum does for it, and at other fractions of a power of two in one model than
    in the other. The large entries' share is the same in both models: the threshold is that of the others alone.
    """
    aligned, base = torch.full((VOCAB,), -9.0), torch.full((VOCAB,), -2.0)
    base[::2] = -0.5
    threshold = float(base.double().logsumexp(0) - aligned.double().logsumexp(0))
    # 16 of them in the first of the row's parts, in different lanes, 8 in the rest
    large = torch.cat([5 + 97 * torch.arange(16), 9000 + 997 * torch.arange(8)])
    offsets = (gap + 2.0**-11 * torch.arange(1, 13)).repeat_interleave(2) * torch.tensor([1, -1]).repeat(12)
    aligned[large], base[large] = (8.0 - threshold - offsets).bfloat16().float(), 8.0
    return [aligned, base], torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, large, True)


@pytest.mark.parametrize("gap", [0.0, 0.0625])
@pytest.mark.parametrize(("alpha", "space"), [(0.5, "logits"), (0.5, "logprobs"), (0.0, "logits")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@each_implementation
def test_candidates_just_above_and_below_the_threshold(
    implementation: str, dtype: torch.dtype, alpha: float, space: str, gap: float
) -> None:
    """Without a gap, nearer to it than rough sums can tell: the row must be summed exactly."""
    (aligned, base), large_V = models_around_the_threshold(gap)
    threshold = base.double().logsumexp(0) - aligned.double().logsumexp(0)
    excess = ((base - aligned).double() - threshold)[large_V]
    assert ((excess > 1e-4).sum(), (excess < -1e-4).sum(), (excess.abs() < 7e-3).sum()) == (12, 12, 0 if gap else 24)
    rows = [model.to(dtype).expand(3, -1) for model in (aligned, base)]
    uniforms = torch.tensor([0.0, 0.6, BELOW_ONE], dtype=torch.float64)
    named = {"alpha": alpha, "space": space, "implementation": implementation}
    check_sample(*rows, uniforms, top_k=16, **named)


@each_implementation
def test_entries_far_below_the_rest(implementation: str) -> None:
    """Finite, but out of the range of what is summed roughly."""
    models = two_models(2, VOCAB, dtype=torch.bfloat16)
    kept = torch.rand(VOCAB, generator=torch.Generator().manual_seed(3)) < 0.9
    options = {"alpha": 0.5, "top_k": 50, "uniforms": random_uniforms(2), "implementation": implementation}
    low = [torch.where(kept, model, -1e4) for model in models]
    absent = [torch.where(kept, model, -math.inf) for model in models]
    for actual, wanted in zip(contrastive_sample(*low, **options), contrastive_sample(*absent, **options), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_k": 40, "top_p": 0.95}], ids=str)
@pytest.mark.parametrize("apart", [1, 20])
@pytest.mark.parametrize("larger", ["few", "tied", "many", "of_base"])
@each_implementation
def test_entries_larger_than_the_first(implementation: str, larger: str, apart: int, filters: dict[str, float]) -> None:
    """The start of the row sets a bound: 700 later entries reach it, equal or not, 3000, or none but 3000 of base's
    weigh much."""
    vocab, generator = 131072, torch.Generator().manual_seed(4)
    aligned = torch.randn(vocab, generator=generator)
    base = aligned + 2 * torch.randn(vocab, generator=generator)  # the largest are on both sides of the threshold
    chosen = slice(70001, 70001 + apart * (700 if larger in ("few", "tied") else 3000), apart)
    for model in (aligned, base):
        model[vocab // 4 :] -= 9
    base[chosen] += 15
    if larger != "of_base":
        aligned[chosen] += 15 + torch.rand(aligned[chosen].shape, generator=generator)
    if larger == "tied":
        aligned[chosen] = base[chosen] = 9.0
    aligned, base = aligned.bfloat16(), base.bfloat16()
    uniforms = torch.tensor([0.0, 0.3, 0.6, BELOW_ONE], dtype=torch.float64)
    rows = (model.expand(4, -1) for model in (aligned, base))
    result = contrastive_sample(*rows, uniforms=uniforms, alpha=0.5, implementation=implementation, **filters)
    check_draws(result, uniforms, kept_weights(contrastive_logits(aligned, base, alpha=0.5), 1.0, **filters))


native = pytest.mark.skipif(WHY_NO_NATIVE is not None, reason=str(WHY_NO_NATIVE))


@native
@pytest.mark.parametrize("top_k", [0, 5])
def test_opcheck(top_k: int) -> None:
    aligned, base = two_models(3, 50, dtype=torch.bfloat16)
    arguments = (aligned, base, random_uniforms(3), 0.5, 0.8, top_k, 0.9, 0.01, False, 45)
    torch.library.opcheck(torch.ops.deepalign.contrastive_sample.default, arguments)


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 50, dtype=torch.float64)}, "logits must be float32, bfloat16 or float16"),
        ({1: torch.zeros(3, 49)}, "base differs in shape"),
        ({1: torch.zeros(50, 3).t()}, "base must have stride 1"),
        ({2: torch.zeros(2, dtype=torch.float64)}, "uniforms must be"),
        ({2: torch.zeros(3, dtype=torch.float16)}, "uniforms must be"),
        ({2: torch.zeros(3, 1)}, "uniforms must be"),
        ({3: -1.0}, "alpha and temperature must be finite and not negative"),
        ({4: math.nan}, "alpha and temperature must be finite"),
        ({3: math.inf}, "alpha and temperature must be finite"),
        ({5: 51}, "top_k must be in"),
        ({5: -1}, "top_k must be in"),
        ({6: 0.0}, "top_p must be in"),
        ({7: math.nan}, "min_p must be in"),
        ({9: 51}, "vocab_size must be in"),
    ],
)
def test_the_op_itself_reads_nothing_out_of_bounds(change: dict[int, object], message: str) -> None:
    arguments = [torch.zeros(3, 50), torch.zeros(3, 50), random_uniforms(3), 0.5, 0.8, 5, 0.9, 0.01, False, 50]
    torch.ops.deepalign.contrastive_sample(*arguments)
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.deepalign.contrastive_sample(*arguments)

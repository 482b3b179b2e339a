"""What the sampler's filters keep, against an oracle that shares nothing with it and against exact distributions."""

import math

import pytest
import torch

from deepalign.kernels.contrastive_sample import contrastive_sample
from tests.kernels.sampler_oracle import (
    BELOW_ONE,
    RUNNABLE,
    RUNNABLE_DTYPES,
    Options,
    Row,
    check_sample,
    draw,
    float64,
    grid,
    random_uniforms,
    support,
    two_models,
)
from tests.kernels.samples import pairwise

INF = math.inf

each_implementation = pytest.mark.parametrize("implementation", RUNNABLE)
each_dtype = pytest.mark.parametrize(("implementation", "dtype"), RUNNABLE_DTYPES, ids=str)


FILTERS = pairwise(
    {
        "alpha": (0.0, 0.8, 2.5),
        "temperature": (0.0, 0.3, 1.0, 2.0),
        "top_k": (0, 1, 5, 50, 10**9),
        "top_p": (1.0, 0.9, 0.3, 1e-12),
        "min_p": (0.0, 0.02, 0.5, 1.0),
        "space": ("logits", "logprobs"),
        "vocab_size": (None, 1, 37, 61),
        "peaked": (True, False),
    }
)


@pytest.mark.parametrize("case", FILTERS, ids=lambda case: "-".join(map(str, case.values())))
@each_dtype
def test_filters_together(implementation: str, dtype: torch.dtype, case: dict[str, object]) -> None:
    options = {name: value for name, value in case.items() if name != "peaked"}
    models = two_models(6, 61, dtype=dtype, peaked=case["peaked"])
    check_sample(*models, random_uniforms(6), implementation=implementation, **options)


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 1}, {"top_k": 4}, {"top_p": 0.3}, {"top_p": 0.8}, {"min_p": 0.1}, {"min_p": 0.6}, {"min_p": 1.0}],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@each_implementation
def test_the_whole_distribution(implementation: str, temperature: float, filters: dict[str, float]) -> None:
    """Over a grid of uniforms tokens come in index order, each as often as its probability says."""
    options = {"alpha": 1.0, "temperature": temperature, **filters}
    aligned, base = (model[3] for model in two_models(9, 12, peaked=False))
    (kept,) = Row(aligned, base, Options(**options)).distributions()
    count, total = 4000, sum(weight for _, weight in kept)
    result = contrastive_sample(
        aligned.expand(count, -1),
        base.expand(count, -1),
        uniforms=grid(count),
        implementation=implementation,
        **options,
    )
    assert result.token_ids.tolist() == sorted(result.token_ids.tolist())
    times = result.token_ids.bincount(minlength=12).tolist()
    for token in range(12):
        probability = dict(kept).get(token, 0.0) / total
        assert (times[token] == 0) if probability == 0 else abs(times[token] - count * probability) <= 1.01
        drawn = result.logprobs[result.token_ids == token].tolist()
        assert not drawn or drawn == pytest.approx([math.log(probability)] * times[token], abs=5e-6)


@each_implementation
def test_frequencies(implementation: str) -> None:
    """Chi-square of 20000 draws over 9 tokens against the exact distribution, below its 99.9% quantile."""
    options = {"alpha": 0.7, "temperature": 1.3, "top_k": 11, "min_p": 0.39}
    aligned, base = (model[0] for model in two_models(1, 14, peaked=False, seed=3))
    (kept,) = Row(aligned, base, Options(**options)).distributions()
    draws = 20000
    result = contrastive_sample(
        aligned.expand(draws, -1),
        base.expand(draws, -1),
        generator=torch.Generator().manual_seed(0),
        implementation=implementation,
        **options,
    )
    total, observed = sum(weight for _, weight in kept), result.token_ids.bincount(minlength=14)
    assert int(observed.sum()) == sum(int(observed[token]) for token, _ in kept) == draws
    expected = {token: draws * weight / total for token, weight in kept}
    assert (len(kept), min(expected.values()) > 5) == (9, True)
    chi_square = sum((int(observed[token]) - mean) ** 2 / mean for token, mean in expected.items())
    assert chi_square < 26.125  # 8 degrees of freedom


@each_implementation
def test_ties_go_to_the_lowest_index(implementation: str) -> None:
    named = {"implementation": implementation}
    tied = [1.0, 2.0, 0.0, 2.0, 2.0, 1.0, 2.0]
    assert support(tied, top_k=1, **named) == [1]
    assert support(tied, top_k=3, **named) == [1, 3, 4]
    assert support(tied, top_k=5, **named) == [0, 1, 3, 4, 6]
    assert support(tied, top_p=1e-9, **named) == [1]
    assert support(tied, min_p=1.0, **named) == [1, 3, 4, 6]
    assert support(tied, temperature=0.0, **named) == [1]
    assert support([-0.0, 0.0, -0.0, 0.0], top_k=2, **named) == [0, 1]
    for top_k in (3, 4, 6, 7):  # three entries present
        assert support([-INF, 0.0, -INF, 0.0, 0.0, -INF], top_k=top_k, **named) == [1, 3, 4]
    assert support([-1.0, 0.0, -0.0], temperature=0, **named) == [1]
    assert support([0.0, -0.0, 0.0, -0.0], top_p=0.5, **named) == [0, 1]


@each_implementation
def test_top_p_stops_where_the_mass_is_reached_exactly(implementation: str) -> None:
    """Of equal entries every prefix has an exact mass; 4 of 8 reach one half, and nothing more is kept."""
    for p, count in ((0.5, 4), (math.nextafter(0.5, 1), 5), (math.nextafter(0.5, 0), 4), (0.125, 1), (BELOW_ONE, 8)):
        assert support([0.0] * 8, top_p=p, implementation=implementation) == list(range(count)), p


@each_implementation
def test_each_filter_sees_what_the_one_before_kept(implementation: str) -> None:
    logits = [math.log(share) for share in (0.2, 0.4, 0.1, 0.3)]
    assert support(logits, top_p=0.5, implementation=implementation) == [1, 3]
    # renormalised over two entries, token 1 alone has 4/7
    assert support(logits, top_p=0.5, top_k=2, implementation=implementation) == [1]
    # the prefix that reaches 0.75 has three entries, of which min-p keeps those of at least 0.24
    assert support(logits, top_p=0.75, implementation=implementation) == [0, 1, 3]
    assert support(logits, top_p=0.75, min_p=0.6, implementation=implementation) == [1, 3]
    # the temperature comes first: squared, the shares of 1 and 3 are 16/30 and 9/30
    assert support(logits, top_p=0.5, temperature=0.5, implementation=implementation) == [1]
    result = draw(logits, grid(50), top_p=0.75, min_p=0.6, implementation=implementation)
    assert set(result.logprobs.exp().mul(7).round(decimals=4).tolist()) == {3.0, 4.0}


@pytest.mark.parametrize("top_k", [0, 1, 5, 1000, 1001])
@each_implementation
def test_all_equal(implementation: str, top_k: int) -> None:
    kept = min(top_k or 1000, 1000)
    uniforms = float64(0.0, 0.5, BELOW_ONE, 0.25)
    logits = torch.full((4, 1000), 3.25)
    result = check_sample(logits, logits, uniforms, alpha=2.0, top_k=top_k, implementation=implementation)
    assert result.token_ids.tolist() == [math.floor(u * kept) for u in uniforms.tolist()]
    assert result.logprobs.tolist() == pytest.approx([-math.log(kept)] * 4, rel=1e-6)


@each_implementation
def test_temperature_zero(implementation: str) -> None:
    """The largest contrastive logit, which is not the largest aligned one, whatever filters and uniforms say."""
    aligned, base = torch.tensor([3.0, 2.0, 1.0]).repeat(2, 1), torch.tensor([8.0, 2.0, 1.0]).repeat(2, 1)
    for uniforms in (float64(0.0, BELOW_ONE), None):
        result = contrastive_sample(
            aligned,
            base,
            alpha=1.0,
            temperature=0,
            top_k=2,
            top_p=0.01,
            min_p=1.0,
            uniforms=uniforms,
            implementation=implementation,
        )
        assert (result.token_ids.tolist(), result.logprobs.tolist()) == ([1, 1], [0.0, 0.0])


@each_dtype
def test_what_is_filtered_or_absent_is_never_drawn(implementation: str, dtype: torch.dtype) -> None:
    """At both ends of the uniforms, with nothing to draw before the first and after the last kept entry."""
    logits = torch.full((4, 41), -2.0, dtype=dtype)
    logits[:, [0, 1, 2, 38, 39, 40]] = -INF
    logits[:, [7, 20, 33]] = torch.tensor([1.0, 1.5, 1.0], dtype=dtype)
    uniforms = float64(0.0, 5e-324, BELOW_ONE, 0.999)
    for filters in ({"top_k": 3}, {"top_p": 0.1}, {"min_p": 0.5}, {"temperature": 1e-3, "top_k": 40}):
        result = check_sample(logits, logits, uniforms, alpha=1.0, implementation=implementation, **filters)
        assert set(result.token_ids.tolist()) <= {7, 20, 33}
    result = check_sample(logits, logits, uniforms, alpha=1.0, implementation=implementation)
    assert result.token_ids.tolist() == [3, 3, 37, 37]


@each_implementation
def test_the_last_uniforms_reach_the_last_entry_of_many(implementation: str) -> None:
    """The sum of 5000 rounded weights must not be passed by the largest uniforms of any dtype."""
    models = [model[:, :4990] for model in two_models(4, 5000, peaked=False)]
    last = float64(BELOW_ONE, 1 - 2**-24, 1 - 2**-11, 1 - 2**-8)
    for filters in ({}, {"top_k": 4000}, {"min_p": 0.01}):
        result = check_sample(*models, last, alpha=0.5, implementation=implementation, **filters)
        assert int(result.token_ids[0]) > 4800

"""The sampler against an oracle that shares nothing with it, row by row; rows, inputs, uniforms, errors."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from deepalign.kernels import checks
from deepalign.kernels.contrastive_sample import (
    IMPLEMENTATIONS,
    ContrastiveSample,
    contrastive_logits,
    contrastive_sample,
)
from tests.kernels.sampler_oracle import (
    RUNNABLE,
    RUNNABLE_DTYPES,
    check_sample,
    draw,
    grid,
    random_uniforms,
    support,
    two_models,
)

NAN, INF = math.nan, math.inf

each_implementation = pytest.mark.parametrize("implementation", RUNNABLE)
each_dtype = pytest.mark.parametrize(("implementation", "dtype"), RUNNABLE_DTYPES, ids=str)


@pytest.mark.parametrize("space", ["logits", "logprobs"])
@pytest.mark.parametrize(("rows", "vocab", "peaked"), [(3, 1, True), (40, 7, False), (40, 100, True), (40, 129, False)])
@each_dtype
def test_against_the_oracle(
    implementation: str, dtype: torch.dtype, rows: int, vocab: int, peaked: bool, space: str
) -> None:
    models = two_models(rows, vocab, dtype=dtype, peaked=peaked, seed=vocab)
    check_sample(*models, random_uniforms(rows), alpha=0.8, space=space, implementation=implementation)


@pytest.mark.parametrize("vocab", [4096, 32000])
@each_dtype
def test_large_vocabularies(implementation: str, dtype: torch.dtype, vocab: int) -> None:
    models = two_models(3, vocab, dtype=dtype)
    for filters in ({}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.95, "min_p": 1e-3}):
        check_sample(*models, random_uniforms(3), alpha=0.5, implementation=implementation, **filters)


@pytest.mark.parametrize("space", ["logits", "logprobs"])
@each_dtype
def test_alpha_zero_and_an_empty_set_leave_aligned_alone(implementation: str, dtype: torch.dtype, space: str) -> None:
    aligned, base = two_models(20, 300, dtype=dtype)
    options = {"uniforms": random_uniforms(20), "top_p": 0.95, "space": space, "implementation": implementation}
    plain = contrastive_sample(aligned, base, alpha=0.0, **options)
    same = contrastive_sample(aligned, aligned.t().contiguous().t(), alpha=5.0, **options)
    # exact in every dtype here: the base model is everywhere 8 above, and favors nothing
    rounded = (aligned * 0.25).round()
    shifted = contrastive_sample(rounded, rounded + 8, alpha=5.0, **options)
    alone = contrastive_sample(rounded, rounded, alpha=5.0, **options)
    for left, right in zip((*plain, *shifted), (*same, *alone), strict=True):
        assert torch.equal(left, right)
    contrasted = contrastive_sample(aligned, base, alpha=5.0, **options)
    assert not torch.equal(contrasted.token_ids, plain.token_ids)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("where", [0, 1])
@each_dtype
def test_exceptional_rows_and_padding(implementation: str, dtype: torch.dtype, where: int, value: float) -> None:
    models = two_models(2, 3, 50, dtype=dtype, peaked=False)
    kept = [v for v in range(45) if v not in (0, 17, 44)]
    dense = [model[0, :, kept].contiguous() for model in models]
    for model in models:
        model[..., 45:] = NAN
        model[0, :, [0, 17, 44]] = -INF
        model[1, 2, :45] = -INF
    models[where][1, 1, 9] = value
    uniforms, named = random_uniforms(2, 3), {"implementation": implementation}
    for options in ({"alpha": 0.5, "top_k": 30}, {"alpha": 2.0, "temperature": 0.0}, {"alpha": 0.0, "top_p": 0.7}):
        result = check_sample(*models, uniforms, vocab_size=45, **options, **named)
        assert (result.token_ids == -1).tolist() == [[False] * 3, [False, True, True]]
        assert result.logprobs.isnan().tolist() == [[False] * 3, [False, True, True]]
        alone = contrastive_sample(*dense, uniforms=uniforms[0], **options, **named)
        assert result.token_ids[0].tolist() == [kept[token] for token in alone.token_ids.tolist()]
        torch.testing.assert_close(result.logprobs[0], alone.logprobs)


@each_dtype
def test_strided_inputs(implementation: str, dtype: torch.dtype) -> None:
    aligned, base = two_models(8, 101, dtype=dtype)
    uniforms = random_uniforms(8)
    options = {"alpha": 1.5, "top_k": 20, "top_p": 0.9, "implementation": implementation}
    expected = contrastive_sample(aligned, base, uniforms=uniforms, **options)
    wide = torch.full((8, 2, 211), NAN, dtype=dtype)
    wide[:, 1, 3:205:2] = base
    spread = torch.full((8, 3), 2.0, dtype=torch.float64)
    spread[:, 1] = uniforms
    result = contrastive_sample(aligned.t().contiguous().t(), wide[:, 1, 3:205:2], uniforms=spread[:, 1], **options)
    one = contrastive_sample(aligned[2].expand(3, -1), base[2].expand(3, -1), uniforms=uniforms[2].expand(3), **options)
    for actual, wanted, repeated in zip(result, expected, one, strict=True):
        torch.testing.assert_close(actual, wanted)
        torch.testing.assert_close(repeated, wanted[2].expand(3))


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (2, 3, 5), (1, 1)], ids=str)
@each_implementation
def test_shapes(implementation: str, shape: tuple[int, ...]) -> None:
    models = two_models(*shape)
    for options in ({}, {"top_p": 0.5, "top_k": 3}, {"temperature": 0.0}):
        check_sample(*models, random_uniforms(*shape[:-1]), alpha=0.5, implementation=implementation, **options)
        drawn = contrastive_sample(*models, alpha=0.5, implementation=implementation, **options)
        assert drawn.token_ids.shape == drawn.logprobs.shape == shape[:-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_implementation
def test_uniforms_of_any_floating_dtype(implementation: str, dtype: torch.dtype) -> None:
    uniforms = torch.tensor([0.0, 0.125, 0.5, 0.9921875], dtype=dtype)
    assert draw([0.0] * 128, uniforms, implementation=implementation).token_ids.tolist() == [0, 16, 64, 127]


@each_implementation
def test_generators(implementation: str) -> None:
    models = two_models(6, 200, peaked=False)
    expected = torch.rand(6, generator=torch.Generator().manual_seed(5))
    first = contrastive_sample(*models, alpha=1.0, uniforms=expected, implementation=implementation)
    for temperature in (1.0, 0.0, 0.5):
        generator = torch.Generator().manual_seed(5)
        options = {"alpha": 1.0, "temperature": temperature, "implementation": implementation}
        drawn = contrastive_sample(*models, generator=generator, **options)
        if temperature == 1.0:
            assert torch.equal(drawn.token_ids, first.token_ids)
        # one draw per row, whatever the temperature
        twin = torch.Generator().manual_seed(5)
        torch.rand(6, generator=twin)
        assert torch.equal(generator.get_state(), twin.get_state())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            assert torch.equal(contrastive_sample(*models, **options).token_ids, drawn.token_ids)


@each_implementation
def test_a_refused_call_and_given_uniforms_draw_nothing(implementation: str) -> None:
    models, generator = two_models(2, 9), torch.Generator().manual_seed(1)
    before, before_global = generator.get_state(), torch.get_rng_state()
    with pytest.raises(ValueError, match="implementation is 'none'"):
        contrastive_sample(*models, alpha=1.0, generator=generator, implementation="none")
    contrastive_sample(*models, alpha=1.0, uniforms=random_uniforms(2), implementation=implementation)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), before_global)


@each_dtype
def test_a_row_depends_on_nothing_but_itself(implementation: str, dtype: torch.dtype) -> None:
    """Not on the batch around it, and not on the number of threads."""
    models, uniforms = two_models(10, 3000, dtype=dtype), random_uniforms(10)
    options = {"alpha": 1.0, "top_p": 0.97, "implementation": implementation}
    together = contrastive_sample(*models, uniforms=uniforms, **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        others = [contrastive_sample(*models, uniforms=uniforms, **options)]
    finally:
        torch.set_num_threads(threads)
    alone = [contrastive_sample(*(m[n] for m in models), uniforms=uniforms[n], **options) for n in range(10)]
    others.append(ContrastiveSample(*(torch.stack(column) for column in zip(*alone, strict=True))))
    for other in others:
        assert torch.equal(other.token_ids, together.token_ids)
        torch.testing.assert_close(other.logprobs, together.logprobs, rtol=1e-6, atol=1e-6)


@each_implementation
def test_extremes(implementation: str) -> None:
    named = {"implementation": implementation}
    largest = torch.finfo(torch.float32).max
    far = [largest, -largest, 0.0, largest]
    for options in ({}, {"temperature": 1e-300}, {"temperature": 1e36}, {"top_k": 2}):
        assert support(far, **options, **named) == [0, 3], options
    for aligned, base in ((far, far[::-1]), (far, [-x for x in far])):
        # b - a beyond float32: aligned's own for alpha 0, and the lowered ones gone for any other
        logits = torch.tensor([aligned, base]).unsqueeze(1)
        assert contrastive_sample(*logits, alpha=0.0, uniforms=torch.tensor([0.9]), **named).token_ids.tolist() == [3]
        assert contrastive_sample(*logits, alpha=1e-3, uniforms=torch.tensor([0.9]), **named).token_ids.tolist() == [3]
    assert support([5.0, 4.0, 3.0], temperature=1e-320, **named) == [0]
    assert support([5.0, 4.0, -9.0], temperature=1e300, **named) == [0, 1, 2]
    assert support([0.0, -800.0, -1e30], min_p=0.0, **named) == [0]


@pytest.mark.parametrize("space", ["logits", "logprobs"])
@each_implementation
def test_an_alpha_beyond_float32_bans_what_it_lowers(implementation: str, space: str) -> None:
    """Also where max(b - a, 0) is 0 for a favored entry, which "logits" does not lower."""
    aligned, base = torch.zeros(64, 4), torch.tensor([-1.0, 2.0, -9.0, -9.0]).expand(64, -1)
    below = torch.tensor([-9.0, -1.0, -9.0, -9.0]).expand(64, -1)
    for alpha in (1e30, 1e300):
        options = {"alpha": alpha, "space": space, "uniforms": grid(64), "implementation": implementation}
        assert contrastive_sample(aligned, base, **options).token_ids.unique().tolist() == [0, 2, 3]
        left = [0, 1, 2, 3] if space == "logits" else [0, 2, 3]
        assert contrastive_sample(aligned, below, **options).token_ids.unique().tolist() == left
    assert not bool(contrastive_logits(aligned, below, alpha=1e300, space=space).isnan().any())


def test_float64_logits_are_served_by_the_reference() -> None:
    models, uniforms = two_models(3, 40, dtype=torch.float64), random_uniforms(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = contrastive_sample(*models, alpha=1.0, uniforms=uniforms)
    expected = contrastive_sample(*models, alpha=1.0, uniforms=uniforms, implementation="reference")
    assert torch.equal(result.logprobs, expected.logprobs)
    for name in IMPLEMENTATIONS.keys() - {"reference"}:
        with pytest.raises(RuntimeError, match=f"'{name}' cannot run"):
            contrastive_sample(*models, alpha=1.0, uniforms=uniforms, implementation=name)


@each_implementation
def test_carries_no_gradient(implementation: str) -> None:
    aligned, base = (model.requires_grad_() for model in two_models(2, 30))
    result = contrastive_sample(
        aligned, base, alpha=1.0, uniforms=random_uniforms(2).requires_grad_(), implementation=implementation
    )
    assert not any(tensor.requires_grad for tensor in result)


@pytest.mark.parametrize("implementation", [*RUNNABLE, None])
def test_compiles_without_a_graph_break_and_in_silence(
    implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_reference_announced", False)
    torch.compiler.reset()  # what other parameters compiled counts towards the limit
    models, uniforms = two_models(4, 60), random_uniforms(4)

    def sample(temperature: float, alpha: float, top_k: int) -> ContrastiveSample:
        options = {"alpha": alpha, "temperature": temperature, "top_k": top_k, "top_p": 0.9, "min_p": 0.01}
        return contrastive_sample(*models, uniforms=uniforms, implementation=implementation, **options)

    compiled = torch.compile(sample, fullgraph=True, dynamic=False, backend="aot_eager")
    for temperature, alpha, top_k in ((0.7, 1.5, 20), (0.0, 1.5, 20), (1.3, 0.0, 0), (0.9, 0.5, 7)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = compiled(temperature, alpha, top_k)
        expected = sample(temperature, alpha, top_k)
        assert torch.equal(actual.token_ids, expected.token_ids)
        torch.testing.assert_close(actual.logprobs, expected.logprobs)


def test_a_compiled_call_draws_for_any_number_of_rows() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def sample(aligned: Tensor, base: Tensor) -> ContrastiveSample:
        return contrastive_sample(aligned, base, alpha=1.0)

    for rows in (3, 5):
        models = two_models(rows, 20)
        expected = contrastive_sample(*models, alpha=1.0, generator=torch.manual_seed(rows))
        torch.manual_seed(rows)
        assert torch.equal(sample(*models).token_ids, expected.token_ids)


@each_implementation
def test_uniforms_of_a_compiled_call(implementation: str) -> None:
    """Its checks do not look at values: the native op does, and the reference draws what was kept all the same."""
    logits = torch.tensor([-INF, 0.0, 2.0, 0.0, 1.0, -INF, 0.0]).expand(6, -1)

    @torch.compile(fullgraph=True, backend="eager")
    def sample(uniforms: Tensor) -> ContrastiveSample:
        return contrastive_sample(logits, logits, alpha=1.0, uniforms=uniforms, top_k=2, implementation=implementation)

    outside = torch.tensor([1.0, 1.5, -0.5, INF, -INF, NAN])
    if implementation == "reference":
        assert set(sample(outside).token_ids.tolist()) <= {2, 4}
        return
    for value in outside:
        with pytest.raises(RuntimeError, match=r"uniforms must be in \[0, 1\)"):
            sample(torch.tensor([0.0, 0.5, 0.9, 0.1, 0.2, value]))
    assert set(sample(torch.full((6,), 0.5)).token_ids.tolist()) == {2}


ON_META = dict.fromkeys(("aligned_logits", "base_logits"), torch.zeros(2, 3, 8, device="meta"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -0.5}, ValueError, "alpha is -0.5; expected a finite number >= 0"),
        ({"alpha": INF}, ValueError, "alpha is inf"),
        ({"alpha": None}, TypeError, "alpha is None, a NoneType"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0; expected a finite number >= 0"),
        ({"temperature": NAN}, ValueError, "temperature is nan"),
        ({"temperature": "1"}, TypeError, "temperature is '1'"),
        ({"top_k": -1}, ValueError, "top_k is -1; expected an int >= 0: 0 keeps every entry"),
        ({"top_k": 2.0}, TypeError, "top_k is 2.0, a float"),
        ({"top_k": True}, TypeError, "top_k is True, a bool"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0; expected a finite number > 0"),
        ({"top_p": 1.001}, ValueError, r"top_p is 1.001; expected a number in \(0, 1\]"),
        ({"top_p": NAN}, ValueError, "top_p is nan"),
        ({"top_p": "0.9"}, TypeError, "top_p is '0.9'"),
        ({"min_p": -0.1}, ValueError, "min_p is -0.1; expected a finite number >= 0"),
        ({"min_p": 2}, ValueError, r"min_p is 2; expected a number in \[0, 1\]"),
        ({"min_p": False}, TypeError, "min_p is False"),
        ({"space": "probs"}, ValueError, "space is 'probs'; expected one of 'logits', 'logprobs'"),
        ({"vocab_size": 9}, ValueError, "vocab_size is 9 but the logits are 8 wide"),
        ({"base_logits": torch.zeros(2, 3, 7)}, ValueError, r"base_logits has shape \(2, 3, 7\)"),
        ({"base_logits": torch.zeros(2, 3, 8).half()}, TypeError, "base_logits is torch.float16"),
        ({"generator": 7}, TypeError, "generator is a int; expected a torch.Generator"),
        ({"generator": torch.Generator(), "uniforms": torch.zeros(2, 3)}, ValueError, "both given"),
        ({**ON_META, "generator": torch.Generator()}, ValueError, r"generator is on cpu .* torch.Generator\('meta'\)"),
        ({"uniforms": 0.5}, TypeError, r"uniforms is a float; expected a floating tensor of shape \(2, 3\)"),
        ({"uniforms": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "uniforms is torch.int64"),
        ({"uniforms": torch.zeros(6)}, ValueError, r"uniforms has shape \(6,\); expected \(2, 3\)"),
        ({"uniforms": torch.zeros(2, 3, device="meta")}, ValueError, "uniforms is on meta and the logits on cpu"),
        ({"uniforms": torch.full((2, 3), 1.0)}, ValueError, r"uniforms has an entry outside \[0, 1\)"),
        ({"uniforms": torch.full((2, 3), -1e-9)}, ValueError, "uniforms has an entry outside"),
        ({"uniforms": torch.full((2, 3), NAN)}, ValueError, "uniforms has an entry outside"),
        ({"implementation": "fast"}, ValueError, "implementation is 'fast'"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_refuses(options: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"aligned_logits": torch.zeros(2, 3, 8), "base_logits": torch.zeros(2, 3, 8), "alpha": 1.0, **options}
    with pytest.raises(error, match=message):
        contrastive_sample(**arguments)

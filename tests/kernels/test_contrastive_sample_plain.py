"""The sampler's plain calls, on CPU tensors (N, V), which the native op is asked to serve before the checks are run."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from deepalign.kernels import checks
from deepalign.kernels.contrastive_sample import api, contrastive_sample
from tests.kernels.sampler_oracle import RUNNABLE, two_models

NAN, INF = math.nan, math.inf

each_implementation = pytest.mark.parametrize("implementation", RUNNABLE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": INF}, ValueError, "alpha is inf"),
        ({"alpha": True}, TypeError, "alpha is True, a bool"),
        ({"alpha": 10**400}, ValueError, "alpha is 1000.*; expected a finite number"),
        ({"temperature": NAN}, ValueError, "temperature is nan"),
        ({"top_k": -1}, ValueError, "top_k is -1"),
        ({"top_k": True}, TypeError, "top_k is True"),
        ({"top_p": 0}, ValueError, "top_p is 0"),
        ({"min_p": 2}, ValueError, "min_p is 2"),
        ({"space": "probs"}, ValueError, "space is 'probs'"),
        ({"vocab_size": 9}, ValueError, "vocab_size is 9"),
        ({"vocab_size": True}, TypeError, "vocab_size is True"),
        ({"base_logits": torch.zeros(2, 7)}, ValueError, "base_logits has shape"),
        ({"aligned_logits": torch.ones(2, 8).long(), "base_logits": torch.ones(2, 8).long()}, TypeError, "int64"),
        ({"base_logits": torch.zeros(2, 8).half()}, TypeError, "base_logits is torch.float16"),
        ({"base_logits": torch.zeros(2, 8, device="meta")}, ValueError, "base_logits is on meta"),
        ({"uniforms": torch.zeros(2, 1)}, ValueError, r"uniforms has shape \(2, 1\)"),
        ({"uniforms": torch.zeros(3)}, ValueError, r"uniforms has shape \(3,\)"),
        ({"uniforms": torch.tensor(0.5)}, ValueError, r"uniforms has shape \(\)"),
        ({"uniforms": torch.zeros(2).long()}, TypeError, "uniforms is torch.int64"),
        ({"uniforms": torch.tensor([0.0, 1.0])}, ValueError, "uniforms has an entry outside"),
        ({"uniforms": torch.tensor([0.0, NAN])}, ValueError, "uniforms has an entry outside"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
@each_implementation
def test_refuses_plain_calls_in_the_same_words(
    implementation: str, options: dict[str, object], error: type[Exception], message: str
) -> None:
    """Where the native op is asked before the checks; and a call that would have drawn its uniforms has drawn none."""
    plain = {"aligned_logits": torch.zeros(2, 8), "base_logits": torch.zeros(2, 8), "alpha": 1.0}
    plain["implementation"] = implementation
    with pytest.raises(error, match=message):
        contrastive_sample(**{**plain, "uniforms": torch.zeros(2), **options})
    generator = torch.Generator()
    before, before_global = generator.get_state(), torch.get_rng_state()
    for source in ({}, {"generator": generator}) if "uniforms" not in options else ():
        with pytest.raises(error, match=message):
            contrastive_sample(**{**plain, **source, **options})
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), before_global)


@pytest.mark.parametrize(
    ("generator", "uniforms", "error", "message"),
    [
        (7, None, TypeError, "generator is a int"),
        (torch.Generator(), torch.zeros(2), ValueError, "both given"),
    ],
)
@each_implementation
def test_refuses_a_plain_call_s_randomness(
    implementation: str, generator: object, uniforms: Tensor | None, error: type[Exception], message: str
) -> None:
    logits = torch.zeros(2, 8)
    with pytest.raises(error, match=message):
        contrastive_sample(
            logits, logits, alpha=1.0, generator=generator, uniforms=uniforms, implementation=implementation
        )


@pytest.mark.parametrize("name", ["alpha", "temperature"])
def test_an_int_beyond_a_double_draws_nothing(name: str) -> None:
    before = torch.get_rng_state()
    for value in (10**400, 2**1024):
        with pytest.raises(ValueError, match=f"{name} is .*; expected a finite number"):
            contrastive_sample(torch.zeros(2, 8), torch.zeros(2, 8), **{"alpha": 1.0, name: value})
    assert torch.equal(torch.get_rng_state(), before)


@each_implementation
def test_what_the_op_does_not_take_is_made_fit(implementation: str) -> None:
    """A top_k beyond the vocabulary, logits strided in it, uniforms of another dtype or stride."""
    models, uniforms = two_models(4, 60), torch.rand(4, generator=torch.Generator().manual_seed(2))
    named = {"alpha": 1, "temperature": 2, "implementation": implementation}
    expected = contrastive_sample(*models, uniforms=uniforms, **named)
    strided = [model.t().contiguous().t() for model in models]
    half_strided = [models[0], strided[1]]
    spread = uniforms[:, None].expand(4, 3).contiguous()[:, 1]
    for logits, given, top_k in (
        (models, uniforms.double(), 100),
        (strided, uniforms, 0),
        (half_strided, uniforms, 0),
        (models, spread, 60),
    ):
        actual = contrastive_sample(*logits, uniforms=given, top_k=top_k, **named)
        generator, twin = (torch.Generator().manual_seed(2) for _ in range(2))
        drawn = contrastive_sample(*logits, generator=generator, top_k=top_k, **named)
        torch.rand(4, generator=twin)
        assert torch.equal(generator.get_state(), twin.get_state())
        for result in (actual, drawn):
            assert torch.equal(result.token_ids, expected.token_ids)
            torch.testing.assert_close(result.logprobs, expected.logprobs)


def test_float64_logits_draw_once() -> None:
    models = two_models(4, 60, dtype=torch.float64)
    generator, twin = (torch.Generator().manual_seed(2) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = contrastive_sample(*models, alpha=1.0, generator=generator)
    expected = contrastive_sample(*models, alpha=1.0, generator=twin, implementation="reference")
    assert torch.equal(drawn.token_ids, expected.token_ids)
    assert torch.equal(generator.get_state(), twin.get_state())


@each_implementation
def test_uniforms_are_drawn_in_float32_whatever_the_default(implementation: str) -> None:
    models, default = two_models(6, 200, peaked=False), torch.get_default_dtype()
    uniforms = torch.rand(6, generator=torch.Generator().manual_seed(5))
    expected = contrastive_sample(*models, alpha=1.0, uniforms=uniforms, implementation=implementation)
    try:
        torch.set_default_dtype(torch.float64)
        generator = torch.Generator().manual_seed(5)
        drawn = contrastive_sample(*models, alpha=1.0, generator=generator, implementation=implementation)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(drawn.token_ids, expected.token_ids)


@pytest.mark.skipif("cpu" not in RUNNABLE, reason="the compiled kernels cannot run")
@pytest.mark.parametrize("dtype", checks.COMPILED_DTYPES, ids=str)
def test_a_plain_call_goes_to_the_op_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that draws its uniforms; the checks take longer than a row's sample."""
    models, uniforms = two_models(2, 60, dtype=dtype), torch.rand(2)

    def fail(*_: object, **__: object) -> None:
        pytest.fail("the checks were run")

    monkeypatch.setattr(api, "check_logits", fail)
    for source in ({}, {"generator": torch.Generator()}, {"uniforms": uniforms}, {"uniforms": uniforms.double()}):
        for options in ({}, {"top_k": 60, "top_p": 1, "vocab_size": 60}, {"temperature": 0, "space": "logprobs"}):
            contrastive_sample(*models, alpha=1.0, **source, **options)
    contrastive_sample(*(model[:, ::2][:, :1] for model in models), alpha=1.0)  # one entry has no stride
    contrastive_sample(*(model[:0] for model in models), alpha=1.0)
    contrastive_sample(*(model[:, :50] for model in models), alpha=1.0)

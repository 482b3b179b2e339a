"""The linear loss against the loss of materialised logits in float64: options, dtypes, chunks, dropped rows, errors."""

import math

import pytest
import torch
from torch import Tensor, nn

from deepalign import lm_head_weight
from deepalign.kernels import linear_rows, products
from deepalign.kernels.completion_loss import (
    CompletionLossConfig,
    fused_completion_loss,
    fused_linear_completion_loss,
)
from deepalign.kernels.linear_rows import CHUNK_SIZES, choose_chunk_rows
from tests.kernels.linear_helpers import CONFIG, Models, largest_error, linear, linear_models, materialised
from tests.kernels.loss_helpers import every_implementation
from tests.kernels.samples import Case, pairwise

# relative to the largest entry: gradients are rounded once
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
OPTIONS = {
    "dtype": list(TOLERANCE),
    "sizes": [(48, 48, 48), (32, 48, 40)],
    "rows": [(13,), (2, 9), ()],
    "chunk_rows": [None, 4],
    "recompute": [False, True],
    "logit_softcap": [None, 6.0],
    "logit_scale": [1.0, 0.6],
    "vocab_size": [None, 251],
    "reduction": ["mean", "sum", "none"],
    "weights": [False, True],
    "given": [False, True],
    "kl_direction": ["student_teacher", "teacher_student"],
    "favored_from": ["aligned", "student"],
    "penalty": ["square", "centered_square"],
    "head": [True, False],
}


def case_name(case: Case) -> str:
    return "-".join(str(value).replace("torch.", "") for value in case.values())


@pytest.mark.parametrize("case", pairwise(OPTIONS), ids=case_name)
def test_options_combined(case: Case) -> None:
    dtype, rows = case.pop("dtype"), case.pop("rows")
    widths = (257, 270, 251) if case["vocab_size"] else (257, 257, 257)
    generator = torch.Generator().manual_seed(1)
    models = linear_models(*rows, sizes=case.pop("sizes"), widths=widths, dtype=dtype).trained(case.pop("head"))
    names = ("kl_direction", "favored_from", "penalty")
    options = {"config": CompletionLossConfig(top_k=7, lambda_reg=0.05, **{name: case.pop(name) for name in names})}
    if case.pop("weights"):
        weights = torch.rand((2, *rows), generator=generator) * (torch.rand(rows, generator=generator) > 0.4)
        options |= {"kl_weight": weights[0], "completion_weight": weights[1]}
    if case.pop("given"):
        options["top_k_indices"] = torch.randint(-1, 251, (*rows, 5), generator=generator)
    per_row = case["reduction"] == "none"
    options["upstream"] = torch.randn(rows, generator=generator) if per_row else 2.5
    computed = {name: case.pop(name) for name in ("chunk_rows", "recompute")}
    options |= case

    output, gradients = linear(models, **computed, **options)
    expected, expected_gradients = materialised(models, **options)
    assert output.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    for name in ("loss", "kl", "completion", "alpha"):
        actual = getattr(output, name).detach()
        assert actual.shape == getattr(expected, name).shape
        torch.testing.assert_close(actual.double(), getattr(expected, name).detach(), rtol=10 * exact, atol=10 * exact)
    assert torch.equal(output.top_k_indices, expected.top_k_indices)
    assert torch.equal(output.base_favored_count, expected.base_favored_count)
    for gradient, wanted, leaf in zip(gradients, expected_gradients, models.leaves(), strict=False):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
        assert largest_error(gradient, wanted) <= TOLERANCE[dtype]
    beyond = case["vocab_size"]
    if beyond and len(gradients) == 2:
        assert not bool(gradients[1][beyond:].any())


@pytest.mark.parametrize("spread", [0.5, 3.0, 6.0])
def test_bfloat16_errs_no_more_than_eager_with_float32_logits(spread: float) -> None:
    """Eager: float32 products of the bfloat16 operands, the loss on these logits, autograd's backward through both.

    Gradients are then rounded once, by the cast of the operands. Rounding the logits to bfloat16 first, as a bfloat16
    linear layer does, is ten times worse at the least.
    """
    config = CompletionLossConfig(top_k=20)
    models = linear_models(32, vocab=4096, sizes=(256, 256, 256), dtype=torch.bfloat16, spread=spread).trained()
    exact, gradients = materialised(models, config=config, reduction="sum")
    ours, our_gradients = linear(models, config=config, reduction="sum")
    eager, eager_gradients = eager_with_float32_logits(models, config)
    coarse_kl = coarse_divergence(models, config)
    for name in ("kl", "completion", "alpha"):
        wanted = getattr(exact, name)
        floor = 8 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
        # the divergence cancels sums as large as the logits
        floor += 8 * torch.finfo(torch.float32).eps * 4 * spread if name == "kl" else 0.0
        error, eager_error = (float((getattr(o, name).double() - wanted).abs().max()) for o in (ours, eager))
        assert error <= eager_error + floor, name
    assert largest_error(coarse_kl, exact.kl) > 10 * largest_error(ours.kl, exact.kl)
    for ours_one, eager_one, wanted in zip(our_gradients, eager_gradients, gradients, strict=True):
        for norm in (2.0, math.inf):
            error, eager_error = (
                float(torch.linalg.vector_norm(one.double() - wanted, norm)) for one in (ours_one, eager_one)
            )
            assert error <= 1.01 * eager_error


def eager_with_float32_logits(models: Models, config: CompletionLossConfig) -> tuple[object, list[Tensor]]:
    logits = [h.float() @ w.float().t() for h, w in (models[0:2], models[2:4], models[4:6])]
    output = fused_completion_loss(
        logits[0], logits[1].detach(), logits[2].detach(), config=config, reduction="sum", implementation="reference"
    )
    return output, list(torch.autograd.grad(output.loss, models.leaves()))


def coarse_divergence(models: Models, config: CompletionLossConfig) -> Tensor:
    logits = [h.detach() @ w.detach().t() for h, w in (models[0:2], models[2:4], models[4:6])]
    return fused_completion_loss(*logits, config=config, implementation="reference").kl


def in_chunks(hidden: Tensor, lm_head: Tensor, chunk_rows: int) -> Tensor:
    """Logits as their products in chunks give them: some libraries add in another order where a matrix has one row."""
    hidden, lm_head = hidden.detach().float(), lm_head.detach().float()
    return torch.cat([rows @ lm_head.t() for rows in hidden.split(chunk_rows)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_implementation
def test_chunks_change_nothing_beyond_rounding(implementation: str, dtype: torch.dtype) -> None:
    """Nothing but what the products of fewer rows change by themselves."""
    models = linear_models(21, dtype=dtype).trained()
    _, gradients = linear(models, chunk_rows=64, implementation=implementation)
    for chunk_rows in (1, 4, 20, 64):
        output, others = linear(models, chunk_rows=chunk_rows, implementation=implementation)
        logits = [in_chunks(*pair, chunk_rows) for pair in (models[0:2], models[2:4], models[4:6])]
        expected = fused_completion_loss(*logits, config=CONFIG, implementation=implementation)
        for one, other in zip(output, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)
        for one, other in zip(others, gradients, strict=True):
            assert largest_error(one, other) <= (8e-3 if dtype == torch.bfloat16 else 1e-6)


def test_rows_without_weight_are_dropped_before_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hidden states may be anything; no product sees them, and their gradient is 0."""
    models = linear_models(40, dtype=torch.bfloat16)
    weight = torch.zeros(40)
    weight[[3, 17, 30]] = torch.tensor([1.0, 0.5, 2.0])
    models.student_hidden[~(weight > 0)] = math.nan
    seen = []
    product_ = products.product_

    def counted(left: Tensor, right: Tensor, out: Tensor, **options: bool) -> None:
        seen.append((tuple(left.shape), tuple(out.shape)))
        product_(left, right, out, **options)

    for module in ("deepalign.kernels.linear_rows", "deepalign.kernels.completion_loss.linear_op"):
        monkeypatch.setattr(f"{module}.product_", counted)
    output, (dhidden, dlm_head) = linear(models.trained(), kl_weight=weight, completion_weight=weight)
    assert [shape for shape, _ in seen] == [(3, 48)] * 3 + [(3, 300), (300, 3)]
    assert bool(torch.isfinite(output.loss))
    assert bool(torch.isfinite(dlm_head).all())
    assert not bool(dhidden[~(weight > 0)].any())
    assert bool(dhidden[weight > 0].any(-1).all())
    assert output.top_k_indices[0].tolist() == [-1] * 7
    assert (float(output.kl[0]), int(output.base_favored_count[0])) == (0.0, 0)
    kept = Models(*(tensor if tensor.shape[0] == 300 else tensor[weight > 0] for tensor in models))
    expected, _ = materialised(kept, kl_weight=weight[weight > 0], completion_weight=weight[weight > 0])
    assert float(output.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-5)


@pytest.mark.parametrize("products_of", [("frozen", 4), ("trained", 5), ("forward", 3), ("recompute", 8)])
def test_number_of_products(products_of: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, expected = products_of
    count = 0
    product_ = products.product_

    def counted(*arguments: Tensor, **options: bool) -> None:
        nonlocal count
        count += 1
        product_(*arguments, **options)

    for module in ("deepalign.kernels.linear_rows", "deepalign.kernels.completion_loss.linear_op"):
        monkeypatch.setattr(f"{module}.product_", counted)
    models = linear_models(5).trained(head=kind in ("trained", "recompute"))
    if kind == "forward":
        with torch.no_grad():
            fused_linear_completion_loss(*models, config=CONFIG)
    else:
        linear(models, recompute=kind == "recompute")
    assert count == expected


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["no rows", "no weight"])
def test_nothing_to_learn_from(case: str, reduction: str, recompute: bool) -> None:
    rows = 0 if case == "no rows" else 3
    models = linear_models(rows).trained()
    weight = torch.zeros(rows)
    output, gradients = linear(
        models, kl_weight=weight, completion_weight=weight, reduction=reduction, recompute=recompute
    )
    assert output.loss.shape == ((rows,) if reduction == "none" else ())
    assert not bool(output.loss.any())
    assert output.top_k_indices.shape == (rows, 7)
    for gradient, leaf in zip(gradients, models.leaves(), strict=True):
        assert gradient.shape == leaf.shape
        assert not bool(gradient.any())


@every_implementation
def test_a_bad_row_disturbs_no_other(implementation: str) -> None:
    models = linear_models(5).trained(head=False)
    models.aligned_hidden[2, 0] = math.nan
    output, (dhidden,) = linear(models, reduction="none", implementation=implementation)
    _, (expected,) = linear(linear_models(5).trained(head=False), reduction="none", implementation=implementation)
    assert output.loss.isnan().tolist() == [False, False, True, False, False]
    assert bool(dhidden[2].isnan().all())
    others = [0, 1, 3, 4]
    torch.testing.assert_close(dhidden[others], expected[others])


def test_the_chunk_is_chosen_by_memory_and_efficiency() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_chunk_rows(128, 128256, cpu, 3.0) == 128
    for rows, vocab in ((8192, 128256), (8192, 32000), (100_000, 1000), (77, 151936)):
        chosen = choose_chunk_rows(rows, vocab, cpu, 3.0)
        assert chosen >= min(rows, CHUNK_SIZES["cpu"].least // 2)  # rows are dealt evenly
        assert chosen <= CHUNK_SIZES["cpu"].most
    # 8192 tokens on a GPU: three float32 buffers, a float16 one and a float16 head, dh and its float32 form, in 2.5 GB
    head = 2 * 128256 * 4096
    chosen = choose_chunk_rows(8192, 128256, gpu, 3.5, head)
    assert chosen >= linear_rows.DEVICE_CHUNK_SIZE.least
    assert chosen * (128256 * 3.5 * 4 + 4096 * 4) + head + 2 * 8192 * 4096 <= 2.45e9
    assert choose_chunk_rows(0, 1000, cpu, 3.0) >= 1


def refused(error: type[Exception], message: str, models: Models | None = None, **changes: object) -> None:
    arguments = (models or linear_models(3))._asdict()
    names = [name for name in changes if name in arguments]
    arguments |= {name: changes.pop(name) for name in names}
    with pytest.raises(error, match=message):
        fused_linear_completion_loss(*arguments.values(), config=CONFIG, **changes)


def test_what_is_refused() -> None:
    hidden, head = torch.randn(3, 48), torch.randn(300, 48)
    refused(TypeError, r"lm_head_weight\(module\)", student_lm_head=nn.Linear(48, 300, bias=False))
    refused(TypeError, "student_hidden is a list", student_hidden=[1.0])
    refused(TypeError, "base_lm_head has dtype torch.int64", base_lm_head=head.long())
    refused(TypeError, "one dtype per model", student_hidden=hidden.bfloat16())
    refused(TypeError, "all float64 or none", aligned_hidden=hidden.double(), aligned_lm_head=head.double())
    refused(ValueError, r"aligned_lm_head has shape \(300,\)", aligned_lm_head=head[:, 0])
    refused(ValueError, "with one H", base_hidden=hidden[:, :40])
    refused(ValueError, "the same rows", base_hidden=torch.randn(4, 48))
    refused(ValueError, "or vocab_size", base_lm_head=torch.randn(310, 48))
    refused(ValueError, "1 <= vocab_size <= 300", base_lm_head=torch.randn(310, 48), vocab_size=301)
    refused(ValueError, "chunk_rows is 0", chunk_rows=0)
    refused(TypeError, "chunk_rows is 1.5", chunk_rows=1.5)
    refused(ValueError, "logit_softcap is 0.0", logit_softcap=0.0)
    refused(TypeError, "logit_scale is '1'", logit_scale="1")
    refused(TypeError, "recompute is 1", recompute=1)
    refused(ValueError, "kl_weight has shape", kl_weight=torch.ones(4))
    refused(ValueError, "top_k_indices has an entry outside", top_k_indices=torch.tensor([[300]] * 3))
    refused(ValueError, "reduction is 'all'", reduction="all")
    refused(ValueError, "implementation is 'fast'", implementation="fast")
    meta = torch.randn(3, 48, device="meta")
    refused(ValueError, "expected one device", student_hidden=meta)
    partitioned = nn.Parameter(torch.empty(0))
    partitioned.ds_shape = torch.Size((300, 48))
    refused(ValueError, "partitioned by ZeRO-3", student_lm_head=partitioned)
    assert lm_head_weight(nn.Linear(48, 300, bias=False)).shape == (300, 48)

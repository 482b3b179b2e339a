"""The same bits whatever the number of threads, the batch, the layout, and whether a gradient is computed."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.completion_loss import CompletionLossConfig, fused_completion_loss
from tests.kernels.loss_helpers import loss_and_gradient, needs_native
from tests.kernels.samples import Case, pairwise, three_models

pytestmark = needs_native
CONFIGS = [
    CompletionLossConfig(top_k=100),
    CompletionLossConfig(top_k=700, kl_direction="teacher_student", penalty="centered_square"),
    CompletionLossConfig(top_k=3, favored_from="student", temperature=1.3),
]
OPTIONS = {"reduction": "none", "implementation": "cpu"}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def awkward(rows: int, vocab: int, dtype: torch.dtype) -> list[Tensor]:
    """Ordinary rows, one with absent entries, one bad, one far from its first entries."""
    models = three_models(rows, vocab, dtype=dtype, seed=rows)
    for model in models:
        model[0, 100:20000] = -torch.inf
        model[-1, vocab // 2] += 300.0
    if rows > 2:
        models[1][1, 5] = torch.nan
    return models


def same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)) for x, y in zip(left, right, strict=True))


def case_name(case: Case) -> str:
    return "-".join(
        str(value.top_k) if isinstance(value, CompletionLossConfig) else str(value) for value in case.values()
    )


@pytest.mark.parametrize(
    "case", pairwise({"rows": (1, 2, 4, 7), "dtype": COMPILED_DTYPES, "config": CONFIGS}), ids=case_name
)
def test_threads_do_not_matter(case: Case) -> None:
    models = awkward(case["rows"], 40007, case["dtype"])
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        output, gradient = loss_and_gradient(*models, config=case["config"], **OPTIONS)
        results.append((*output, gradient))
    assert all(same(result, results[0]) for result in results[1:])


def test_threads_do_not_matter_to_ties() -> None:
    """Every segment has more candidates than it may keep, and all are tied."""
    aligned = torch.zeros(1, 70001)
    base = (torch.arange(70001) % 3 == 0).float()[None]
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        output = fused_completion_loss(aligned, aligned, base, config=CompletionLossConfig(top_k=5000), **OPTIONS)
        assert torch.equal(output.top_k_indices[0], 3 * torch.arange(5000))
        assert int(output.base_favored_count[0]) == 23334


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_alone_is_the_row_in_a_batch(threads: int) -> None:
    torch.set_num_threads(threads)
    models = awkward(5, 33001, torch.bfloat16)
    output, gradient = loss_and_gradient(*models, config=CONFIGS[0], **OPTIONS)
    for row in range(5):
        alone, alone_gradient = loss_and_gradient(
            *(model[row : row + 1] for model in models), config=CONFIGS[0], **OPTIONS
        )
        assert same((*alone, alone_gradient), tuple(value[row : row + 1] for value in (*output, gradient)))


@pytest.mark.parametrize(
    "case",
    pairwise({"config": CONFIGS, "dtype": COMPILED_DTYPES, "given": (False, True), "threads": (1, 3)}),
    ids=case_name,
)
def test_statistics_do_not_depend_on_the_gradient_or_its_place(case: Case) -> None:
    torch.set_num_threads(case["threads"])
    models = awkward(4, 20021, case["dtype"])
    options = {**OPTIONS, "config": case["config"]}
    if case["given"]:
        options["top_k_indices"] = torch.tensor([5, 20020, -1, 5, 300]).expand(4, 5)
    training, gradient = loss_and_gradient(*models, **options)
    in_place, gradient_in_place = loss_and_gradient(*models, inplace=True, **options)
    forward_only = fused_completion_loss(*models, **options)
    assert same(forward_only, training)
    assert same((*in_place, gradient_in_place), (*training, gradient))


def test_repeated_calls_give_the_same_bits() -> None:
    torch.set_num_threads(3)
    models = three_models(2, 50001, dtype=torch.float16)
    first = loss_and_gradient(*models, config=CONFIGS[0], **OPTIONS)
    for _ in range(5):
        output, gradient = loss_and_gradient(*models, config=CONFIGS[0], **OPTIONS)
        assert same((*output, gradient), (*first[0], first[1]))


@pytest.mark.parametrize("vocab", [40, 700, 5000, 32000])
def test_the_divergence_does_not_depend_on_who_selects(vocab: int) -> None:
    models = three_models(4, vocab, seed=vocab)
    config = CompletionLossConfig(top_k=3)
    own = fused_completion_loss(*models, config=config, **OPTIONS)
    others = own.top_k_indices.flip(0).contiguous()
    given = fused_completion_loss(*models, config=config, top_k_indices=others, **OPTIONS)
    assert torch.equal(given.kl, own.kl)
    assert torch.equal(given.base_favored_count, own.base_favored_count)
    assert not torch.equal(given.completion, own.completion)

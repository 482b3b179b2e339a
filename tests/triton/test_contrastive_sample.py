"""The sampler's Triton kernel in the interpreter: held to the oracle like any other implementation."""

import math

import pytest
import torch

from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.contrastive_sample import contrastive_sample
from deepalign.kernels.contrastive_sample import triton as sample_triton
from tests.kernels import test_contrastive_sample as rows
from tests.kernels.sampler_oracle import BELOW_ONE, check_sample, random_uniforms, two_models
from tests.kernels.samples import pairwise
from tests.triton import interpreted  # noqa: F401  (puts "interpreted" into the table)
from tests.triton.interpreted import sizes

RUN = {"implementation": "interpreted"}
CASES = pairwise(
    {
        "dtype": COMPILED_DTYPES,
        "alpha": (0.0, 0.8, 2.5),
        "temperature": (0.0, 0.3, 2.0),
        "top_k": (0, 1, 5, 50, 10**9),
        "top_p": (1.0, 0.9, 1e-12),
        "min_p": (0.0, 0.02, 1.0),
        "space": ("logits", "logprobs"),
        "vocab_size": (None, 1, 37),
    }
)


@pytest.fixture(autouse=True)
def _small_tiles():
    with sizes("contrastive_sample", block=64, programs=1):  # 61 entries in one tile
        yield


def first_and_last(logits: list[float], **options: object) -> list[int]:
    """The tokens of the least and the largest uniform."""
    both = torch.tensor([logits] * 2)
    uniforms = torch.tensor([0.0, BELOW_ONE], dtype=torch.float64)
    return contrastive_sample(both, both, alpha=1.0, uniforms=uniforms, **options, **RUN).token_ids.tolist()


def test_extremes() -> None:
    largest = torch.finfo(torch.float32).max
    for options in ({}, {"temperature": 1e-300}, {"temperature": 1e36}, {"top_k": 2}):
        assert first_and_last([largest, -largest, 0.0, largest], **options) == [0, 3], options
    assert first_and_last([5.0, 4.0, 3.0], temperature=1e-320) == [0, 0]
    assert first_and_last([5.0, 4.0, -9.0], temperature=1e300) == [0, 2]
    assert first_and_last([0.0, -800.0, -1e30]) == [0, 0]


@pytest.mark.parametrize("space", ["logits", "logprobs"])
def test_an_alpha_beyond_float32_bans_what_it_lowers(space: str) -> None:
    aligned, base = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 9.0, 0.0]])
    result = contrastive_sample(aligned, base, alpha=1e300, uniforms=torch.tensor([0.99]), space=space, **RUN)
    assert result.token_ids.tolist() in ([0], [2])


def test_a_filter_sees_what_the_one_before_kept() -> None:
    logits = [math.log(share) for share in (0.4, 0.3, 0.2, 0.1)]
    assert first_and_last(logits, top_k=2, top_p=0.6) == [0, 1]  # 4/7 < 0.6
    assert first_and_last(logits, top_k=2, top_p=0.5) == [0, 0]
    assert first_and_last(logits, top_p=0.75, min_p=0.7) == [0, 1]
    assert first_and_last(logits, top_p=0.75) == [0, 2]


def test_exceptional_rows_and_padding() -> None:
    models = two_models(8, 40)
    for model in models:
        model[1, 3:9] = -math.inf  # absent
        model[2] = -math.inf  # nothing is present
        model[:, 36:] = math.nan  # beyond vocab_size
    for row, where, value in (
        (3, 0, math.nan),
        (4, 1, math.nan),
        (5, 0, math.inf),
        (6, 1, -math.inf),
        (7, 0, -math.inf),
    ):
        models[where][row, 12] = value
    for chosen in ({"top_k": 6}, {"temperature": 0.0}):
        result = check_sample(*models, random_uniforms(8), alpha=0.7, vocab_size=36, **chosen, **RUN)
        assert (result.token_ids == -1).tolist() == [False, False, True, True, True, True, True, True]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_filters_together(case: dict[str, object]) -> None:
    options = dict(case)
    dtype = options.pop("dtype")
    check_sample(*two_models(1, 61, dtype=dtype), random_uniforms(1), **options, **RUN)


# A row flatter than that is kept from filters by sweeps over it: what they leave is more than the parts list.
FILTERS = (
    ({}, 1.0), ({"top_k": 40, "top_p": 0.9}, 1.0), ({"top_p": 0.6}, 3.0), ({"top_p": 0.6}, 0.1),
    ({"top_p": 0.5, "min_p": 0.05}, 3.0), ({"min_p": 0.1}, 3.0), ({"min_p": 0.1}, 0.1), ({"temperature": 0.0}, 1.0),
)  # fmt: skip


@pytest.mark.parametrize("programs", [1, 128])
@pytest.mark.parametrize(("chosen", "spread"), FILTERS, ids=str)
def test_many_tiles_and_parts(chosen: dict[str, float], spread: float, programs: int) -> None:
    aligned, base = (model * spread for model in two_models(1, 1100, dtype=torch.bfloat16))
    with sizes("contrastive_sample", block=128, programs=programs):
        launch = sample_triton.launch_of("contrastive_sample", aligned.device)
        assert sample_triton.parts_of_rows(launch, 1, 1100, 0)[0] == min(programs, 8)
        check_sample(aligned, base, random_uniforms(1), alpha=0.5, **chosen, **RUN)


def test_parts_that_are_empty_or_bad_or_hold_it_all() -> None:
    """1100 entries in parts of 384: the largest in one part, all ties, absent parts, a bad entry in the last."""
    aligned, base = two_models(5, 1100, dtype=torch.float32)
    aligned[0, 300:310] += 40.0
    aligned[1] = base[1] = 2.5
    aligned[2, :1000] = base[2, :1000] = -math.inf
    aligned[3, 1099] = math.nan
    aligned[4, 0] = base[4, 0] = -300.0  # whose sums start again from maxima
    with sizes("contrastive_sample", block=128, programs=20):
        for chosen in ({}, {"top_k": 20}, {"temperature": 0.0}):
            result = check_sample(aligned, base, random_uniforms(5), alpha=0.5, **chosen, **RUN)
            assert (result.token_ids < 0).tolist() == [False, False, False, True, False]


def test_more_selected_entries_leave_fewer_parts() -> None:
    launch = sample_triton.launch_of("contrastive_sample", torch.device("cpu"))._replace(block=2048, programs=128)
    assert sample_triton.parts_of_rows(launch, 1, 128256, 50) == (16, 64, 50)
    assert sample_triton.parts_of_rows(launch, 1, 128256, 1024) == (4, 1024, 1024)
    assert sample_triton.parts_of_rows(launch, 1, 128256, 0) == (16, 256, 128)
    assert sample_triton.parts_of_rows(launch, 512, 128256, 0)[0] == 1


def test_one_launch_gives_the_same_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that waits for others cannot be interpreted alone; here it finds what they published before."""
    aligned, base = two_models(2, 1100, dtype=torch.bfloat16)
    words: list[torch.Tensor] = []

    def kept(entries: int, device: torch.device) -> torch.Tensor:
        words.append(torch.zeros(entries, dtype=torch.int64))
        return words[-1]

    def again(entries: int, device: torch.device) -> torch.Tensor:
        words[0][-3:] = 0  # two rows' counts of parts, and the next program's number
        return words[0]

    arguments = (aligned, base, random_uniforms(2), 0.5, 1.0, 20, 0.9, 0.0, False, 1100)
    with sizes("contrastive_sample", block=128, programs=4):
        monkeypatch.setattr(sample_triton, "new_words", kept)
        apart = sample_triton.contrastive_sample(*arguments, together=False)
        monkeypatch.setattr(sample_triton, "new_words", again)
        together = sample_triton.contrastive_sample(*arguments)
    assert words[0][-3:].tolist() == [2, 2, 4]
    for left, right in zip(together, apart, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    rows.test_shapes("interpreted", shape)


@pytest.mark.parametrize("top_p", [0.25])
@pytest.mark.parametrize("top_k", [30, 1100])
def test_ties_are_kept_in_index_order(top_k: int, top_p: float) -> None:
    logits = torch.full((2600,), -1000.0)
    tied = torch.arange(5, 2600, 2)
    logits[tied] = 3.0
    uniforms = torch.tensor([0.0, BELOW_ONE], dtype=torch.float64)
    both = logits.expand(2, -1).contiguous()
    with sizes("contrastive_sample", block=2048):
        result = contrastive_sample(both, both, alpha=1.0, uniforms=uniforms, top_k=top_k, top_p=top_p, **RUN)
    kept = math.ceil(top_p * min(top_k or len(tied), len(tied)))
    assert result.token_ids.tolist() == tied[[0, kept - 1]].tolist()
    assert result.logprobs.tolist() == pytest.approx([-math.log(kept)] * 2, rel=1e-6)


@pytest.mark.parametrize("shift", [1000.0])
def test_a_shift_of_the_base_model_changes_nothing(shift: float) -> None:
    aligned, _ = (model.mul(4).round() for model in two_models(1, 61))
    options = {"uniforms": random_uniforms(1), "top_k": 20, "top_p": 0.9, "space": "logprobs", **RUN}
    expected = contrastive_sample(aligned, aligned, alpha=3.0, **options)
    for actual, wanted in zip(
        contrastive_sample(aligned, aligned + shift, alpha=3.0, **options), expected, strict=True
    ):
        assert torch.equal(actual, wanted)


def test_a_row_depends_on_nothing_but_itself() -> None:
    models, uniforms = two_models(3, 61, dtype=torch.bfloat16), random_uniforms(3)
    together = contrastive_sample(*models, alpha=0.7, uniforms=uniforms, top_k=9, **RUN)
    alone = [
        contrastive_sample(
            *(model[n : n + 1] for model in models), alpha=0.7, uniforms=uniforms[n : n + 1], top_k=9, **RUN
        )
        for n in (2, 0)
    ]
    assert [int(one.token_ids) for one in alone] == together.token_ids[[2, 0]].tolist()
    assert [float(one.logprobs) for one in alone] == together.logprobs[[2, 0]].tolist()

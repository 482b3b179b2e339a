"""Cases have the patterns they are named for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases import LOSS_CASES, PATTERNS, WORST_CASES, Case, three_models
from benchmarks.contestants import (
    MODES,
    PAIR_OPERATIONS,
    LossContestants,
    PairContestants,
    SamplerContestants,
    runnable,
)
from benchmarks.peers import loss_peers
from deepalign import fused_completion_loss


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str, dtype: str) -> None:
    student, aligned, base = three_models(Case(3, 5001, dtype, pattern))
    assert {logits.dtype for logits in (student, aligned, base)} == {getattr(torch, dtype)}
    assert {logits.shape for logits in (student, aligned, base)} == {(3, 5001)}
    assert student.float().std() > 1
    difference_NV = base.float() - aligned.float()
    step_NV = difference_NV.diff()
    if pattern == "equal":
        assert not difference_NV.any()
    elif pattern in ("ascending", "descending"):
        sign = 1 if pattern == "ascending" else -1
        assert bool((sign * step_NV >= 0).all())
        assert torch.equal(difference_NV.amax(-1), torch.full((3,), 8.0))
        assert len(difference_NV[0].unique()) > 500
    else:
        assert 0.4 < (step_NV > 0).float().mean() < 0.6
        assert student.amax() > 8  # some tokens far above the others


def test_cases_are_what_they_are_called() -> None:
    assert [str(case) for case in LOSS_CASES[:2]] == ["bfloat16-64x128256", "bfloat16-16x151936"]
    assert str(WORST_CASES[1]) == "bfloat16-64x128256-ascending"
    assert WORST_CASES[-1].vocab % 2 == 1
    assert Case(3, 7).elements == 21


def test_quick_mode_shrinks_cases_and_keeps_odd_ones_odd() -> None:
    code = (
        "from benchmarks.cases import Case, sized\n"
        "print([(sized(case).rows, sized(case).vocab) for case in (Case(64, 128256), Case(1, 128127))])"
    )
    variables = os.environ | {"DEEPALIGN_BENCH_QUICK": "1"}
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    found = subprocess.run(command, cwd=root, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert found.strip() == "[(2, 2004), (1, 2001)]"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", runnable("completion_loss", "cpu"))
def test_contestants_of_the_loss_can_be_called_again(implementation: str, mode: str) -> None:
    contestants = LossContestants(Case(3, 500, "float32"))
    originals = [logits.clone() for logits in three_models(contestants.case)]
    for contestant in (contestants.library(implementation, mode), contestants.peer(loss_peers()["eager"], mode)):
        for _ in range(2):
            contestant.prepare()
            contestant.call()
    for logits, original in zip(three_models(contestants.case), originals, strict=True):
        assert torch.equal(logits, original), "a contestant wrote to the case's logits"
        assert logits.grad is None


def test_inplace_contestant_overwrites_logits_with_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(student: torch.Tensor, *others: torch.Tensor, **options: object) -> object:
        before = student.detach().clone()
        output = fused_completion_loss(student, *others, **options)
        seen.append((before, student.detach(), options["inplace"]))
        return output

    monkeypatch.setattr("benchmarks.contestants.fused_completion_loss", spy)
    contestants = LossContestants(Case(3, 500, "float32"))
    inplace = contestants.library("reference", "forward_backward_inplace")
    for _ in range(2):
        inplace.prepare()
        inplace.call()
    for before, after, was_inplace in seen:
        assert was_inplace
        assert torch.equal(before, contestants.student), "every round starts from the case's logits"
        assert not torch.equal(after, before)


@pytest.mark.parametrize("operation", PAIR_OPERATIONS)
def test_pair_contestants_call_the_operation_they_name(operation: str) -> None:
    contestants = PairContestants(operation, Case(3, 500))
    result = contestants.library("reference").call()
    assert type(result).__name__.lower() == operation.replace("_", "")


def test_sampler_contestants_pass_their_options_on() -> None:
    contestants = SamplerContestants(Case(3, 500), alpha=0.5, temperature=0.8, top_k=1)
    first = contestants.library("reference").call()
    assert torch.equal(first.logprobs, torch.zeros(3)), "top_k=1 leaves one token"

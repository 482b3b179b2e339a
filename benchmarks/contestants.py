"""Who is compared: each runnable implementation of each operation, called as a user calls it, and its peers."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case, three_models
from benchmarks.interleaved import Contestant
from deepalign import base_favored_tokens, contrastive_sample, fused_completion_loss, position_divergence
from deepalign.kernels import completion_loss as completion_loss_op
from deepalign.kernels import contrastive_sample as contrastive_sample_op
from deepalign.kernels import position_divergence as position_divergence_op

TABLES: dict[str, Mapping[str, object]] = {
    "completion_loss": completion_loss_op.IMPLEMENTATIONS,
    "contrastive_sample": contrastive_sample_op.IMPLEMENTATIONS,
    "base_favored_tokens": position_divergence_op.IMPLEMENTATIONS,
    "position_divergence": position_divergence_op.IMPLEMENTATIONS,
}
PAIR_OPERATIONS: dict[str, Callable[..., Any]] = {
    "base_favored_tokens": base_favored_tokens,
    "position_divergence": position_divergence,
}
MODES = ("forward", "forward_backward", "forward_backward_inplace")
_ONE_DEVICE = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}  # the reference runs anywhere


def runnable(operation: str, device: str) -> list[str]:
    """Implementations of an operation that can run on a type of device ("cpu", "cuda")."""
    return [
        name
        for name, found in TABLES[operation].items()
        if not isinstance(found, str) and _ONE_DEVICE.get(name, device) == device
    ]


def on_cpu(operation: str) -> list[Any]:
    """`runnable` on the CPU as pytest's parameters; beside something faster the reference is for the full suite."""
    names = runnable(operation, "cpu")
    return [pytest.param(n, marks=pytest.mark.full if n == "reference" and len(names) > 1 else ()) for n in names]


def finished(device: str, call: Callable[[], object]) -> Callable[[], object]:
    """`call`, over when it returns."""
    if device == "cpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


# ---- completion loss


class _Produced(torch.autograd.Function):
    """Logits as a model hands them over: not a leaf, their buffer free to be overwritten."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits_NV: Tensor) -> Tensor:
        return logits_NV.detach()

    @staticmethod
    def backward(ctx: Any, gradient_NV: Tensor) -> tuple[None, None]:
        return None, None


class LossContestants:
    """The library's loss and its peers on one case: reduction "sum", both row weights given.

    `waits`: a call is over when it returns, on a GPU too; otherwise whoever times it looks at the stream.
    """

    def __init__(self, case: Case, *, waits: bool = True) -> None:
        self.case, self.waits_for = case, case.device if waits else "cpu"
        self.student, self.aligned, self.base = three_models(case)
        generator = torch.Generator(case.device).manual_seed(1)
        self.weights = torch.rand(2, case.rows, generator=generator, device=case.device) + 0.5

    def library(self, implementation: str, mode: str) -> Contestant:
        """The public function, in one of `MODES`."""

        def loss(student: Tensor, inplace: bool = False) -> Tensor:
            return fused_completion_loss(
                student,
                self.aligned,
                self.base,
                kl_weight=self.weights[0],
                completion_weight=self.weights[1],
                reduction="sum",
                inplace=inplace,
                implementation=implementation,
            ).loss

        if mode == "forward_backward_inplace":
            return self._inplace(loss)
        return self._contestant(loss, mode)

    def peer(self, loss_of: Callable[..., Any], mode: str) -> Contestant:
        """A function of `peers.loss_peers()`; in place there is none, so it competes with a new gradient."""
        return self._contestant(lambda student: loss_of(student, self.aligned, self.base, *self.weights).loss, mode)

    def _contestant(self, loss: Callable[[Tensor], Tensor], mode: str) -> Contestant:
        """On a leaf whose gradient is set to None before."""
        if mode == "forward":
            return Contestant(finished(self.waits_for, torch.no_grad()(lambda: loss(self.student))))
        leaf = self.student.detach().requires_grad_()

        def prepare() -> None:
            leaf.grad = None

        return Contestant(finished(self.waits_for, lambda: loss(leaf).backward()), prepare)

    def _inplace(self, loss: Callable[..., Tensor]) -> Contestant:
        anchor = torch.zeros((), device=self.case.device, requires_grad=True)
        buffer = torch.empty_like(self.student)
        produced: list[Tensor] = []

        def prepare() -> None:
            buffer.copy_(self.student)
            produced[:] = [_Produced.apply(anchor, buffer)]

        return Contestant(finished(self.waits_for, lambda: loss(produced.pop(), inplace=True).backward()), prepare)


# ---- sampler and position statistics


class SamplerContestants:
    """The library's sampler and its peers on one case, with one uniform per row."""

    def __init__(self, case: Case, **options: float) -> None:
        self.case, self.options = case, options
        _, self.aligned, self.base = three_models(case)
        self.uniforms = torch.rand(case.rows, generator=torch.Generator().manual_seed(2)).to(case.device)

    def drawing(self, rows: int) -> dict[str, Any]:
        """Options of the draw for the first `rows` rows."""
        return {**self.options, "uniforms": self.uniforms[:rows]}

    def library(self, implementation: str) -> Contestant:
        """The public function."""
        options = self.drawing(self.case.rows) | {"implementation": implementation}
        return Contestant(finished(self.case.device, lambda: contrastive_sample(self.aligned, self.base, **options)))

    def peer(self, sample: Callable[..., Any]) -> Contestant:
        """A function of `peers.sampler_peers()`."""
        call = torch.no_grad()(lambda: sample(self.aligned, self.base, self.uniforms, **self.options))
        return Contestant(finished(self.case.device, call))


class PairContestants:
    """An operation of `PAIR_OPERATIONS` and its peers on one case."""

    def __init__(self, operation: str, case: Case) -> None:
        self.operation, self.case = PAIR_OPERATIONS[operation], case
        _, self.aligned, self.base = three_models(case)

    def library(self, implementation: str) -> Contestant:
        """The public function."""
        call = lambda: self.operation(self.aligned, self.base, implementation=implementation)  # noqa: E731
        return Contestant(finished(self.case.device, call))

    def peer(self, function: Callable[..., Any]) -> Contestant:
        """A function of `peers.pair_peers()`."""
        call = torch.no_grad()(lambda: function(self.aligned, self.base))
        return Contestant(finished(self.case.device, call))

"""The linear loss and its peers on one case: what `bench_linear.py` times and `linear_memory.py` weighs.

Everybody gets bfloat16 hidden states and heads. The bars are about time beside the bare products, by the fastest route
to a float32 result that can be had here, and about peak memory beside eager PyTorch with float32 logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import QUICK
from benchmarks.interleaved import Contestant
from benchmarks.peers import loss_eager
from deepalign import fused_linear_completion_loss
from deepalign.kernels.products import BLOCK_ELEMENTS, product_, product_route


@dataclass(frozen=True)
class LinearCase:
    """`rows` tokens, `hidden` entries of a hidden state, `vocab` entries of the vocabulary."""

    rows: int = 128
    hidden: int = 2048
    vocab: int = 128256
    head: bool = False  # whether the student's head is trained
    device: str = "cpu"

    def __str__(self) -> str:
        return f"bfloat16-{self.rows}x{self.hidden}x{self.vocab}-{'trained' if self.head else 'frozen'}"

    @property
    def products(self) -> int:
        return 5 if self.head else 4


FROZEN, TRAINED = LinearCase(), LinearCase(head=True)


def sized(case: LinearCase) -> LinearCase:
    """Small in quick mode."""
    return LinearCase(min(case.rows, 8), 64, case.vocab // 64, case.head) if QUICK else case


class LinearContestants:
    """The library and its peers on one case."""

    def __init__(self, case: LinearCase) -> None:
        generator = torch.Generator(case.device).manual_seed(0)
        self.case = case

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, device=case.device, dtype=dtype).normal_(0, scale, generator=generator)

        shared = normal(case.rows, case.hidden)
        self.hidden = [(shared + normal(*shared.shape, scale=0.1)).bfloat16() for _ in range(3)]
        self.heads = [
            normal(case.vocab, case.hidden, scale=3 / case.hidden**0.5, dtype=torch.bfloat16) for _ in range(3)
        ]
        self.weights = torch.ones(2, case.rows, device=case.device)
        self.hidden[0].requires_grad_()
        self.heads[0].requires_grad_(case.head)

    def prepare(self) -> None:
        self.hidden[0].grad = self.heads[0].grad = None

    def library(self, recompute: bool = False, chunk_rows: int | None = None) -> Contestant:
        """The public function with `.backward()`."""

        def call() -> None:
            pairs = [tensor for pair in zip(self.hidden, self.heads, strict=True) for tensor in pair]
            fused_linear_completion_loss(
                *pairs,
                kl_weight=self.weights[0],
                completion_weight=self.weights[1],
                reduction="sum",
                recompute=recompute,
                chunk_rows=chunk_rows,
            ).loss.backward()

        return Contestant(call, self.prepare)

    def eager(self, float32_logits: bool, rows_at_a_time: int | None = None) -> Contestant:
        """Eager PyTorch; `rows_at_a_time`: a loop over chunks, each with its own backward, as trainers write it.

        float32 logits of bfloat16 operands need a float32 copy of the head: torch has no other way to them on a CPU.
        Otherwise a bfloat16 linear layer, its result converted.
        """

        def logits(model: int, rows: slice) -> Tensor:
            hidden, head = self.hidden[model][rows], self.heads[model]
            return F.linear(hidden.float(), head.float()) if float32_logits else F.linear(hidden, head)

        def call() -> None:
            step = rows_at_a_time or self.case.rows
            for first in range(0, self.case.rows, step):
                rows = slice(first, first + step)
                student = logits(0, rows)
                with torch.no_grad():
                    teachers = logits(1, rows), logits(2, rows)
                loss_eager(student, *teachers, *self.weights[:, rows]).loss.backward()

        return Contestant(call, self.prepare)


# ---- the bare products: every route to a float32 result


def _product_native(left: Tensor, right: Tensor, out: Tensor) -> None:
    product_(left, right, out)


def _product_blocks(left: Tensor, right: Tensor, out: Tensor) -> None:
    """The right matrix converted in blocks, then torch's float32 product."""
    left = left.float()
    columns = right.shape[1] >= right.shape[0]
    width = max(1, BLOCK_ELEMENTS // min(right.shape))
    for first in range(0, max(right.shape), width):
        block = slice(first, first + width)
        if columns:
            torch.mm(left, right[:, block].float(), out=out[:, block])
        else:
            out.addmm_(left[:, block], right[block].float(), beta=int(first > 0))


def _product_rounded(left: Tensor, right: Tensor, out: Tensor) -> None:
    """torch's own product, its result rounded to bfloat16: too coarse for logits, and the speed to compare with."""
    torch.mm(left.to(right.dtype), right)


def multiplies_bfloat16() -> bool:
    """Whether this processor does. Peers that multiply it are called only then.

    Elsewhere torch takes 2.5 times as long as in float32 (Zen 3: 9.5 and 24 GFLOP/s), 28 s a call of the frozen case.
    """
    return product_route(torch.device("cpu"), torch.bfloat16) == "native_bf16"


def product_routes() -> dict[str, Callable[[Tensor, Tensor, Tensor], None]]:
    """By name; those in bfloat16 only where processors multiply it."""
    routes: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {"blocks": _product_blocks}
    if multiplies_bfloat16():
        routes |= {"native_bf16": _product_native, "rounded_bf16": _product_rounded}
    return routes


class BareProducts:
    """The products of one call alone, into buffers that are there: three of logits, then dh, then dW where trained.

    The gradient is a bfloat16 matrix here, the fastest: the library multiplies it in two terms where that matters.
    """

    def __init__(self, contestants: LinearContestants) -> None:
        case = contestants.case
        self.hidden = [tensor.detach() for tensor in contestants.hidden]
        self.heads = [tensor.detach() for tensor in contestants.heads]
        self.logits = torch.randn(case.rows, case.vocab, device=case.device)
        self.dlogits = self.logits.bfloat16()
        self.dhidden = torch.empty(case.rows, case.hidden, device=case.device)
        self.dlm_head = torch.zeros(case.vocab, case.hidden, device=case.device) if case.head else None

    def contestant(self, route: str) -> Contestant:
        product = product_routes()[route]

        def call() -> None:
            for hidden, head in zip(self.hidden, self.heads, strict=True):
                product(hidden, head.t(), self.logits)
            product(self.dlogits, self.heads[0], self.dhidden)
            if self.dlm_head is not None:
                product(self.dlogits.t(), self.hidden[0], self.dlm_head)

        return Contestant(call)

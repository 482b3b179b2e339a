"""Norms of parameter gradients without the gradients: which operations use a parameter, and what they saw.

A matrix used once, as y = x W^T over n positions, has for token t the gradient G_t = delta_t^T x, delta_t (n, out) the
gradient in y. Its norm needs no (out, in) matrix: with the QR decomposition x^T = Q R, ‖G_t‖ = ‖R delta_t‖, R (n, n),
as Q has orthonormal columns. R belongs to the forward, so all tokens share it, and a token costs n² out products
instead of n in out. Where n >= in, R is x^T itself. (The Gram form, the sum of (delta_i · delta_j)(x_i · x_j), costs as
much but squares: with one large common direction in x, which language models have, it cancels in float32.)

Forwards run under `ParameterUses`, which sees every `linear`, `addmm` and `embedding` that reads a measured parameter,
in whatever module. Whether it saw all uses is not assumed but counted in the autograd graph. A parameter with a use it
did not see, or with two uses whose gradients would have to be added before the norm, is left to the caller to do the
plain way; the one exception is an embedding tied to the output layer, where the sum is known (`embedding_squares`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deepalign.diagnose.token_gradients import HeadCut
from deepalign.kernels.checks import compute_dtype


@dataclass(frozen=True)
class LinearUse:
    """A product with a matrix left of the cut; the gradient in `probe` is the squared norm of the matrix's."""

    probe: Tensor


@dataclass(frozen=True)
class HeadUse:
    """A product with a matrix right of the cut: inputs (S, in) and `output`, a row per token."""

    inputs_SH: Tensor
    output: Tensor


@dataclass(frozen=True)
class EmbeddingUse:
    """A look-up of `ids` (n,); rows of `padding_idx` get no gradient."""

    ids: Tensor
    output: Tensor
    padding_idx: int | None


Use = LinearUse | HeadUse | EmbeddingUse


class _SquaredNorm(torch.autograd.Function):
    """Identity in `output`, whose backward gives `probe` the squared norm of the gradient of the matrix before it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *doutputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (factor,), (doutput,) = ctx.saved_tensors, doutputs
        rows = doutput.reshape(-1, doutput.shape[-1]).to(factor.dtype)
        return doutput, (factor @ rows).square().sum(), None


class ParameterUses(TorchFunctionMode):
    """While active, records the uses of `measured` parameters, by id; `cut` tells on which side of it they are."""

    def __init__(self, measured: Iterable[nn.Parameter], cut: HeadCut) -> None:
        super().__init__()
        self.uses: dict[int, list[Use]] = {id(parameter): [] for parameter in measured}
        self.cut = cut
        self._factored: tuple[Tensor | None, Tensor | None] = (None, None)  # q, k and v share their input

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.linear and len(args) >= 2:
            return self._linear(args[0], args[1], output)
        if func is torch.addmm and len(args) == 3 and not kwargs:  # GPT-2's linear layers
            return self._linear(args[1], args[2], output)
        if func is functional.embedding:
            self._embedding(output, *args, **(kwargs or {}))
        return output

    def _linear(self, inputs: Tensor, weight: Tensor, output: Tensor) -> Tensor:
        found = self.uses.get(id(weight))
        if found is None:
            return output
        if self.cut.leaf is not None:
            found.append(HeadUse(inputs.detach().reshape(-1, inputs.shape[-1]), output))
            return output
        probe = torch.zeros((), dtype=compute_dtype(output), device=output.device, requires_grad=True)
        found.append(LinearUse(probe))
        result: Tensor = _SquaredNorm.apply(output, probe, self._factor(inputs))
        return result

    def _factor(self, inputs: Tensor) -> Tensor:
        known, factor = self._factored
        if known is inputs and factor is not None:
            return factor
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(compute_dtype(inputs))
        factor = rows.mT if rows.shape[0] >= rows.shape[1] else torch.linalg.qr(rows.mT, mode="r").R
        self._factored = (inputs, factor)
        return factor

    def _embedding(
        self,
        output: Tensor,
        ids: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> None:
        if id(weight) in self.uses and max_norm is None and not scale_grad_by_freq and not sparse:
            padding = None if padding_idx is None else padding_idx % weight.shape[0]
            self.uses[id(weight)].append(EmbeddingUse(ids.reshape(-1), output, padding))


def count_uses(root: Tensor) -> Counter[int]:
    """How many operations in the graph of `root` read each leaf, by the leaf's id."""
    counts: Counter[int] = Counter()
    seen, stack = set(), [root.grad_fn] if root.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            if variable is not None:
                counts[id(variable)] += 1
            else:
                stack.append(following)
    return counts


def head_squares(use: HeadUse, doutput_SV: Tensor) -> Tensor:
    """(S,) squared norms of the matrix's gradients, each an outer product of one row with one row."""
    inputs_SH = use.inputs_SH.to(compute_dtype(doutput_SV))
    return doutput_SV.to(inputs_SH.dtype).square().sum(-1) * inputs_SH.square().sum(-1)


def embedding_squares(use: EmbeddingUse, doutput_CnH: Tensor, head: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(C,) squared norms of the gradients of an embedding matrix.

    A token that stands at several positions has one row, so their gradients are added before the norm. Tied to the
    output layer, whose gradient is dlogits ⊗ h, it gets twice the inner product of the two on top; the caller adds the
    output layer's own square.

    Args:
        use: the look-up of n ids.
        doutput_CnH: (C, n, H) gradients in what it returned.
        head: tied: dlogits (C, V) and h (C, H) of the same tokens.
    """
    doutput_CnH = doutput_CnH.to(compute_dtype(doutput_CnH))
    rows, position_to_row = use.ids.unique(return_inverse=True)
    added = doutput_CnH.new_zeros(len(doutput_CnH), len(rows), doutput_CnH.shape[-1])
    added.index_add_(1, position_to_row, doutput_CnH)
    if use.padding_idx is not None:
        added[:, rows == use.padding_idx] = 0
    squares = added.square().sum((1, 2))
    if head is not None:
        dlogits_CV, hidden_CH = (tensor.to(added.dtype) for tensor in head)
        inner_CU = torch.einsum("cuh,ch->cu", added, hidden_CH)
        squares = squares + 2 * (dlogits_CV[:, rows] * inner_CU).sum(-1)
    return squares


def known_uses(uses: Mapping[int, list[Use]], parameter: nn.Parameter, count: int) -> tuple[Use, ...] | None:
    """A parameter's uses if its norm follows from them, HeadUse first; None if its gradient has to be formed."""
    found = uses[id(parameter)]
    if len(found) != count:
        return None
    found = sorted(found, key=lambda use: not isinstance(use, HeadUse))
    kinds = [type(use) for use in found]
    known = len(found) <= 1 or kinds == [HeadUse, EmbeddingUse]
    return tuple(found) if known else None

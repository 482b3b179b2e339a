"""What a backward does with gradients that the forward computed for an upstream gradient of 1.

On a CPU the upstream gradient is looked at. Where it is 1 the saved gradient is handed on, else a scaled copy is made.

A GPU is not waited for. A backward that does not keep its graph first takes from the graph what was saved; a gradient
that nobody else refers to is then its own, and its rows are scaled where they lie, by a kernel that reads the factors
and leaves alone what they say is to stay: no copy, and for 1 no traffic. Whatever a graph still holds, or somebody
else, is copied, scaled. So what autograd has saved is never written to, and a captured graph needs neither look nor
copy.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import Parameter

from deepalign.kernels.library import WHY_NO_TRITON


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        raise RuntimeError(
            "a fused loss has a first derivative only, and was asked to differentiate twice; expected no second one: "
            "use fused_completion_loss(..., implementation='reference'), without inplace, or detach the gradient"
        )


# A private call; a torch without it fails in `Tensor.item`, loudly.
_is_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: False)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A second derivative becomes an error: how a gradient saved by the forward was computed autograd does not know.

    torch's `once_differentiable` looks at the upstream gradient alone; where that needs no gradient it takes the
    second derivative for 0. Without `create_graph` the engine has turned autograd off, and nothing is in the way.
    """

    @wraps(backward)
    def call(ctx: Any, *upstream: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        return tuple(None if found is None else _Once.apply(found.detach().requires_grad_()) for found in gradients)

    return call


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation is in progress and follows this tensor; not for traced calls."""
    return unpack_dual(tensor).tangent is not None


def check_no_tangent(name: str, tensor: Tensor) -> None:
    """Raise RuntimeError for what `has_tangent`: an op without autograd would drop the tangent, silently."""
    if not torch.compiler.is_compiling() and has_tangent(tensor):
        raise RuntimeError(
            f"{name} has a tangent of forward-mode differentiation, of which a fused loss has none; expected reverse "
            "mode: use backward(), or fused_completion_loss(..., implementation='reference')"
        )


def take_saved(ctx: Any) -> list[Tensor]:
    """The tensors that a node has saved. If the graph is not kept it has none of them afterwards."""
    saved = list(ctx.saved_tensors)
    ctx.maybe_clear_saved_tensors()
    return saved


def times_upstream(saved: list[Tensor], place: int, upstream: Tensor, *, given_away: bool = False) -> Tensor:
    """A saved gradient times the upstream gradient, in the saved one's dtype; the product is rounded once.

    Args:
        saved: what `take_saved` returned, nothing else referring to it. At `place` a gradient (..., V).
        upstream: one number (), or one per row (...,).
        given_away: whoever else refers to the gradient's memory does not use it any more.
    """
    known = _has_values(upstream)
    if known and is_not_waited_for(upstream):
        if (given_away and not _graph_is_kept()) or is_alone(saved, place):
            return _scale_rows_(saved[place], upstream)
    elif known and _is_one(upstream):
        # Autograd may adopt what it is given as a leaf's .grad and add the next gradient into it: a graph that will
        # run again needs its own.
        return saved[place].clone() if _graph_is_kept() else saved[place]
    if known and upstream.is_cuda:
        return _scale_rows_(saved[place].clone(), upstream)
    # As a matrix: a number may be rounded to the gradient's dtype before the product.
    gradient, factors = saved[place], _per_row(saved[place], upstream)
    if not known:  # fused where it is compiled
        return torch.where(gradient == 0, gradient, (gradient * factors).to(gradient.dtype))
    product = torch.mul(gradient, factors, out=torch.empty_like(gradient))
    # Padding, and rows that are not read, have no gradient, also where the factor is infinite.
    return product if bool(torch.isfinite(upstream).all()) else product.masked_fill_(gradient == 0, 0)


def _has_values(upstream: Tensor) -> bool:
    """Whether it is one tensor that could be looked at: not traced, not `is_grads_batched`, not on the meta device."""
    plain = type(upstream) in (Tensor, Parameter) and not (upstream.is_meta or torch.compiler.is_compiling())
    return plain and not _is_batched(upstream)


def is_not_waited_for(upstream: Tensor) -> bool:
    """Whether to look at a tensor's values would wait for its device."""
    return upstream.is_cuda


def _graph_is_kept() -> bool:
    """Whether the backward in progress keeps its graph; only this private call tells."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _owners(tensor: Tensor) -> tuple[int, int, int]:
    """How many refer to a tensor, to its memory, and to the Python object of its memory."""
    memory = tensor.untyped_storage()
    owners = tensor._use_count()  # type: ignore[attr-defined]
    return owners, torch._C._storage_Use_Count(memory._cdata), sys.getrefcount(memory)


# The counts of a new tensor that only a list refers to. A torch without these private calls copies every time.
_NEW = [torch.empty(1)]
_COUNTS = hasattr(_NEW[0], "_use_count") and hasattr(torch._C, "_storage_Use_Count")
_REFERENCES, _OWNERS = sys.getrefcount(_NEW[0]), _owners(_NEW[0]) if _COUNTS else None


def is_alone(held: list[Tensor], place: int) -> bool:
    """Whether a tensor, and its memory, is referred to by that list only: by no graph, hook, view or variable."""
    return _COUNTS and sys.getrefcount(held[place]) == _REFERENCES and _owners(held[place]) == _OWNERS


def _is_one(upstream: Tensor) -> bool:
    if not upstream.dim():
        return upstream.item() == 1.0
    if upstream.numel() and not any(upstream.stride()):  # expanded from one number
        return upstream[(0,) * upstream.dim()].item() == 1.0
    return all(value == 1.0 for value in upstream.flatten().tolist())


def _per_row(gradient: Tensor, upstream: Tensor) -> Tensor:
    return upstream.expand(gradient.shape[:-1]).unsqueeze(-1)


def _scale_rows_(gradient: Tensor, upstream: Tensor) -> Tensor:
    if WHY_NO_TRITON is not None:
        return gradient.mul_(_per_row(gradient, upstream))
    from deepalign.kernels.scale_rows import scale_rows_

    return scale_rows_(gradient, upstream.expand(gradient.shape[:-1]))

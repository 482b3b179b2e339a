"""GradMag(t) = ‖d log P(y_t | x, y_<t) / d theta‖ (Eq. 2), by answer position and by parameter.

Exact, and cheaper than one backward per token: tokens go backward in batches, only activation gradients flow, and
norms of matrices' gradients are had without the matrices (`token_gradients.py`, `parameter_uses.py`). Small
parameters (gains, biases) get their gradients formed in the same batch. What no shortcut is known for is formed for one
token at a time, the plain way, and named in `GradientMagnitude.formed`.

Squared norms of different parameters add up, so the norm over any group follows from the parameters' own.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from deepalign.data.chat import EncodedExample
from deepalign.diagnose.parameter_uses import (
    EmbeddingUse,
    HeadUse,
    LinearUse,
    ParameterUses,
    Use,
    count_uses,
    embedding_squares,
    head_squares,
    known_uses,
)
from deepalign.diagnose.token_gradients import (
    Backward,
    HeadCut,
    SpanGraph,
    answer_range,
    check_examples,
    only_requiring_grad,
    spans,
    trace_span,
)
from deepalign.kernels.checks import compute_dtype

SMALL = 1 << 16  # entries up to which a parameter's gradients are formed for a whole chunk of tokens
Group = Literal["parameter", "module", "layer", "kind"]
LAYER = re.compile(r"(.*?\.\d+)\.(.+)")


@dataclass(frozen=True)
class GradientMagnitude:
    """GradMag(t) of one answer of T tokens.

    Attributes:
        parameters: P names, in the model's order; a tied matrix appears once, by its first name.
        squares_TP: (T, P) float64 on the CPU: squared norms of d log P(y_t) / d parameter. Row 0 is the first answer
            token (t = 1 in the paper).
        logprobs_T: (T,) float64: log P(y_t | x, y_<t) in nats.
        formed: the parameters for which no shortcut was known: their gradients were formed, one token at a time. The
            figures are as exact, only slower.
    """

    parameters: tuple[str, ...]
    squares_TP: Tensor
    logprobs_T: Tensor
    formed: tuple[str, ...]

    @property
    def total(self) -> Tensor:
        """(T,) float64: GradMag(t) over all measured parameters."""
        return self.squares_TP.sum(-1).sqrt()

    def by(self, group: Group | Callable[[str], str]) -> dict[str, Tensor]:
        """GradMag(t), (T,) float64 each, over groups of parameters, in the order of their first parameter.

        Args:
            group: "parameter"; "module", without the parameter's own name; "layer", as "model.layers.3", modules
                outside of layers by themselves; "kind", the same module of all layers together, as
                "self_attn.q_proj"; or a function from a parameter's name to its group's.

        Raises:
            ValueError: an unknown group.
        """
        name_of = GROUPS.get(group) if isinstance(group, str) else group
        if name_of is None:
            raise ValueError(f"group is {group!r}; expected one of {', '.join(GROUPS)}, or a function of the name")
        columns: dict[str, list[int]] = {}
        for column, parameter in enumerate(self.parameters):
            columns.setdefault(name_of(parameter), []).append(column)
        return {name: self.squares_TP[:, chosen].sum(-1).sqrt() for name, chosen in columns.items()}


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _layer(parameter: str) -> str:
    found = LAYER.match(parameter)
    return found[1] if found else _module(parameter)


def _kind(parameter: str) -> str:
    found = LAYER.match(parameter)
    return _module(found[2]) if found else _module(parameter)


GROUPS: dict[str, Callable[[str], str]] = {"parameter": str, "module": _module, "layer": _layer, "kind": _kind}


def gradient_magnitude(
    model: PreTrainedModel,
    examples: Sequence[EncodedExample],
    *,
    parameters: Literal["all", "trainable"] | Callable[[str], bool] = "all",
    max_positions: int | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    progress: bool = True,
) -> list[GradientMagnitude]:
    """GradMag(t) (Eq. 2) at every answer token of every example.

    Args:
        model: a causal language model in evaluation mode, any device and floating dtype, with or without adapters (a
            PEFT model may be passed as it is). Sums of squares are in float32 at least, in float64 for float64.
        examples: encoded conversations or contexts; P prompt ids, then the answer's.
        parameters: "all"; "trainable", those that require a gradient (for a PEFT model its adapters); or a function
            that says by a parameter's name whether it is measured.
        max_positions: only the first so many answer tokens; None for all.
        vocab_size: logits beyond this index do not exist (padded vocabularies); None for all.
        chunk_tokens: answer tokens whose backward passes run together, which bounds memory: gradients of about
            chunk_tokens x (prompt + answer) positions are in flight. None chooses.
        progress: show a bar over answer tokens.

    Returns:
        A `GradientMagnitude` per example, in order.

    Raises:
        ValueError: the model is in training mode; no examples, or one without prompt or answer, too long for the model
            or with ids outside its vocabulary; a size below 1; `parameters` chooses none, or one that cannot have a
            gradient (quantised, or partitioned by ZeRO-3).
        RuntimeError: the model does not know `logits_to_keep`, or calls its output layer in an unknown way.

    Warns:
        UserWarning: the model has operations that cannot be batched; it goes on one backward per token.
    """
    check_examples(model, examples, max_positions, chunk_tokens)
    measured = _chosen(model, parameters)
    backward = Backward()
    ranges = [answer_range(example, max_positions) for example in examples]
    results = []
    with (
        only_requiring_grad(model, measured.values()),
        torch.enable_grad(),
        tqdm(total=sum(map(len, ranges)), desc="GradMag", unit="token", disable=not progress) as bar,
    ):
        for example, answer in zip(examples, ranges, strict=True):
            ids_L = torch.tensor(example.input_ids[: answer.stop], device=model.device)
            squares, logprobs, formed = [], [], set()
            for span, chunks in spans(answer.start, answer.stop, chunk_tokens, model.device):
                norms = _SpanNorms(model, measured, ids_L, span, vocab_size)
                for chunk in chunks:
                    squares.append(norms.squares(chunk, backward))
                    bar.update(len(chunk))
                logprobs.append(norms.graph.logprobs_S.detach().double().cpu())
                formed |= set(norms.formed)
            names = tuple(name for name in measured if name in formed)
            results.append(GradientMagnitude(tuple(measured), torch.cat(squares), torch.cat(logprobs), names))
    return results


class _SpanNorms:
    """One forward over a span's prefix, and what is asked of its backward passes."""

    def __init__(
        self,
        model: PreTrainedModel,
        measured: dict[str, nn.Parameter],
        ids_L: Tensor,
        span: range,
        vocab_size: int | None,
    ) -> None:
        self.measured = measured

        def watch(cut: HeadCut) -> ParameterUses:
            self.seen = ParameterUses(measured.values(), cut)
            return self.seen

        self.graph: SpanGraph = trace_span(model, ids_L, span, vocab_size=vocab_size, watch=watch)
        self._plan()
        head_uses = [use for uses in self.known.values() for use in uses if isinstance(use, HeadUse)]
        self.dleaf_SH, *doutputs = self.graph.head_gradients([use.output for use in head_uses])
        self.dlogits = {id(use): doutput for use, doutput in zip(head_uses, doutputs, strict=True)}

    def _plan(self) -> None:
        """Sort the parameters into those known by their uses, small ones, and those to be formed token by token."""
        in_body, in_head = count_uses(self.graph.hidden), count_uses(self.graph.logprobs_S)
        self.known: dict[str, tuple[Use, ...]] = {}
        self.small: dict[str, nn.Parameter] = {}
        self.formed: dict[str, nn.Parameter] = {}
        for name, parameter in self.measured.items():
            count = in_body[id(parameter)] + in_head[id(parameter)]
            uses = known_uses(self.seen.uses, parameter, count)
            if uses is not None:
                self.known[name] = uses
            elif parameter.numel() <= SMALL and not in_head[id(parameter)]:
                self.small[name] = parameter
            else:
                self.formed[name] = parameter

    def squares(self, chunk: range, backward: Backward) -> Tensor:
        """(C, P) float64 on the CPU: squared norms of the gradients of the chunk's tokens."""
        cotangents = self.graph.cotangents(self.dleaf_SH, chunk)
        body = [(name, use) for name, uses in self.known.items() for use in uses if not isinstance(use, HeadUse)]
        inputs = [use.probe if isinstance(use, LinearUse) else use.output for _, use in body]
        gradients = backward(self.graph.hidden, cotangents, [*inputs, *self.small.values()])
        columns = {name: torch.zeros(len(chunk), dtype=torch.float64) for name in self.measured}
        for (name, use), gradient in zip(body, gradients[: len(body)], strict=True):
            if gradient is not None:
                columns[name] += self._body_squares(name, use, gradient, chunk).double().cpu()
        for name, gradient in zip(self.small, gradients[len(body) :], strict=True):
            if gradient is not None:
                columns[name] += _square(gradient.flatten(1)).cpu()
        for name, uses in self.known.items():
            if uses and isinstance(uses[0], HeadUse):
                columns[name] += (
                    head_squares(uses[0], self.dlogits[id(uses[0])])[chunk.start : chunk.stop].double().cpu()
                )
        for row, token in enumerate(chunk):
            for name, square in self._formed_squares(cotangents[row], token).items():
                columns[name][row] = square
        return torch.stack(list(columns.values()), -1)

    def _body_squares(self, name: str, use: Use, gradient: Tensor, chunk: range) -> Tensor:
        if isinstance(use, LinearUse):
            return gradient
        assert isinstance(use, EmbeddingUse)
        first = self.known[name][0]
        tied = None
        if isinstance(first, HeadUse):
            rows = slice(chunk.start, chunk.stop)
            tied = (self.dlogits[id(first)][rows], first.inputs_SH[rows])
        return embedding_squares(use, gradient.reshape(len(chunk), len(use.ids), -1), tied)

    def _formed_squares(self, cotangent: Tensor, token: int) -> dict[str, float]:
        """The plain way, for one token: gradients of both sides of the cut, added."""
        if not self.formed:
            return {}
        hidden, logprob = self.graph.hidden, self.graph.logprobs_S[token]
        wanted = list(self.formed.values())
        sides = [torch.autograd.grad(logprob, wanted, retain_graph=True, allow_unused=True)]
        if hidden.requires_grad:
            sides.append(torch.autograd.grad(hidden, wanted, cotangent, retain_graph=True, allow_unused=True))
        squares = {}
        for name, *gradients in zip(self.formed, *sides, strict=True):
            there = [gradient for gradient in gradients if gradient is not None]
            squares[name] = float(_square(torch.stack(there).sum(0).flatten())) if there else 0.0
        return squares


def _square(gradients: Tensor) -> Tensor:
    """Sums of squares over the last dimension, float64."""
    return gradients.to(compute_dtype(gradients)).square().sum(-1).double()


def _chosen(
    model: PreTrainedModel, parameters: Literal["all", "trainable"] | Callable[[str], bool]
) -> dict[str, nn.Parameter]:
    """The measured parameters by name, each once."""
    if not callable(parameters) and parameters not in ("all", "trainable"):
        raise ValueError(f"parameters is {parameters!r}; expected 'all', 'trainable' or a function of the name")
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (parameters(name) if callable(parameters) else parameters == "all" or parameter.requires_grad)
    }
    if not chosen:
        raise ValueError("parameters chooses no parameter of the model; expected at least one")
    for name, parameter in chosen.items():
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameter {name} is {parameter.dtype}, which has no gradient; expected floating numbers: of a "
                "quantised model measure the adapters, parameters='trainable'"
            )
        if hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"parameter {name} is partitioned over ranks; expected a whole model: load it without ZeRO-3"
            )
    return chosen

"""Gradients of log P(y_t | x, y_<t) for many answer tokens t at once: what Eq. 2 and Eq. 3 share.

The plain way is one forward and one backward per answer token. Here the graph is cut at the input of the output layer:

    ids -> embedding -> layers -> norm -> hidden (1, S, H)  |  leaf -> lm_head -> scale, softcap -> log P, S tokens

Right of the cut every row is a token of its own, so one backward of the sum gives d log P / d hidden of all of them.
Left of it a token needs a backward of its own, through all positions before it. Those run as a batch of vector-Jacobian
products (`torch.autograd.grad(is_grads_batched=True)`): every matrix product has C x n rows for C tokens over a prefix
of n positions, while the forward's activations are there once. Nothing but activation gradients flows unless a
parameter's own gradient is asked for.

Attention is causal: tokens up to t need only the positions before t. An answer is therefore cut into spans, each with
a forward over its own prefix. A forward costs about as much as one token's backward, and a span of S tokens makes its
tokens carry S / 2 positions too many on average, so that n / S + S / 2 is to be small: S = sqrt(2 n). In tiny models
the forward's fixed cost counts for more, hence a least span.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from deepalign.data.chat import EncodedExample
from deepalign.kernels.checks import compute_dtype
from deepalign.models import context_length
from deepalign.sampling.modes import check_evaluation_mode

# Rows (tokens x positions) of activation gradients in flight. On a CPU more rows leave the cache and get slower
# (docs/log.md); a GPU's number is set by memory, not measured.
ROWS_IN_FLIGHT = {"cpu": 1280}
DEVICE_ROWS_IN_FLIGHT = 16384
LEAST_SPAN = 16


@dataclass(frozen=True)
class SpanGraph:
    """The graph of log P of S consecutive answer tokens, cut at the output layer.

    `hidden` (1, S, H) ends the graph of the layers, `leaf` (1, S, H) starts that of the output layer, `logprobs_S`
    ends it. `states` are the model's hidden states, (1, n, H) each, where they were asked for.
    """

    hidden: Tensor
    leaf: Tensor
    logprobs_S: Tensor
    states: tuple[Tensor, ...]

    def head_gradients(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Row s: the gradient of token s's log P in `leaf`, then in each of `outputs` (of the output layer's side)."""
        gradients = torch.autograd.grad(self.logprobs_S.sum(), [self.leaf, *outputs], retain_graph=True)
        return [gradient.reshape(len(self.logprobs_S), -1) for gradient in gradients]

    def cotangents(self, dleaf_SH: Tensor, tokens: range) -> Tensor:
        """(C, 1, S, H): for each of C tokens, what its backward through the layers starts from."""
        rows = torch.arange(len(tokens), device=dleaf_SH.device)
        cotangents = dleaf_SH.new_zeros(len(tokens), *self.hidden.shape)
        cotangents[rows, 0, rows + tokens.start] = dleaf_SH[tokens.start : tokens.stop]
        return cotangents


class HeadCut:
    """While active, cuts the graph at the input of the model's output layer; `hidden` and `leaf` are the two ends."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.head: nn.Module | None = model.get_output_embeddings()
        self.name = type(model).__name__
        if self.head is None:
            raise ValueError(f"model is a {self.name} without an output layer; expected a causal language model")
        self.hidden: Tensor | None = None
        self.leaf: Tensor | None = None

    def __enter__(self) -> "HeadCut":
        assert self.head is not None
        self._handle = self.head.register_forward_pre_hook(self._cut)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _cut(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.leaf is not None or not args:
            raise RuntimeError(f"{self.name} calls its output layer in a way that is not known here; expected one call")
        self.hidden = args[0]
        self.leaf = args[0].detach().requires_grad_()
        return (self.leaf, *args[1:])


class Backward:
    """Backward passes of several tokens at once; one by one, after a warning, in a model that cannot be batched."""

    def __init__(self) -> None:
        self.batched = True

    def __call__(self, hidden: Tensor, cotangents: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients (C, *shape) of hidden · cotangents[c] in each of `inputs`; None where it does not depend on one."""
        if not inputs or not hidden.requires_grad:
            return [None] * len(inputs)
        if self.batched:
            try:
                return list(self._grad(hidden, inputs, cotangents, is_grads_batched=True))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                warnings.warn(
                    f"one backward pass per token from here on, which is slower: they cannot be batched ({reason})",
                    stacklevel=2,
                )
                self.batched = False
        by_token = [self._grad(hidden, inputs, cotangent) for cotangent in cotangents]
        return [None if column[0] is None else torch.stack(column) for column in zip(*by_token, strict=True)]

    @staticmethod
    def _grad(hidden: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(hidden, inputs, cotangent, retain_graph=True, allow_unused=True, **options)


def trace_span(
    model: PreTrainedModel,
    ids_L: Tensor,
    span: range,
    *,
    vocab_size: int | None = None,
    states: bool = False,
    watch: Callable[[HeadCut], TorchFunctionMode] | None = None,
) -> SpanGraph:
    """Run `model` on the prefix that the tokens `ids_L[span]` need.

    Args:
        model: causal, evaluation mode; what requires a gradient is the caller's affair.
        ids_L: (L,) int64 on the model's device.
        span: positions in `ids_L` of the tokens to predict, at least 1 each, consecutive.
        vocab_size: logits beyond this index do not exist.
        states: keep the hidden states.
        watch: makes a mode to run the forward under, given the cut.
    """
    with contextlib.ExitStack() as stack:
        cut = stack.enter_context(HeadCut(model))
        # Attention as plain products: the fused kernels' backward cannot be batched.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if watch is not None:
            stack.enter_context(watch(cut))
        output = model(
            input_ids=ids_L[None, : span.stop - 1],
            use_cache=False,
            logits_to_keep=len(span),
            output_hidden_states=states,
        )
    if cut.leaf is None or cut.hidden is None or cut.leaf.shape[:2] != (1, len(span)):
        seen = None if cut.leaf is None else tuple(cut.leaf.shape)
        raise RuntimeError(
            f"the output layer of {type(model).__name__} was given {seen}; expected (1, {len(span)}, H): the model "
            "must know logits_to_keep and call the module that get_output_embeddings() names"
        )
    logits_SV = output.logits[0, :, :vocab_size]
    logprobs_SV = logits_SV.to(compute_dtype(logits_SV)).log_softmax(-1)
    logprobs_S = logprobs_SV.gather(-1, ids_L[span.start : span.stop, None])[:, 0]
    return SpanGraph(cut.hidden, cut.leaf, logprobs_S, tuple(output.hidden_states) if states else ())


def spans(start: int, stop: int, chunk_tokens: int | None, device: torch.device) -> Iterator[tuple[range, list[range]]]:
    """Cut the tokens [start, stop) into spans (one forward each) and those into chunks (one batch of backwards each).

    Chunks count from the span's first token. `chunk_tokens` bounds them; None chooses by the rows in flight.
    """
    most_rows = ROWS_IN_FLIGHT.get(device.type, DEVICE_ROWS_IN_FLIGHT)
    while start < stop:
        span = range(start, min(stop, start + max(LEAST_SPAN, math.isqrt(2 * start))))
        chunk = chunk_tokens or max(1, most_rows // (span.stop - 1))
        chunk = math.ceil(len(span) / math.ceil(len(span) / chunk))  # of one size
        yield span, [range(first, min(len(span), first + chunk)) for first in range(0, len(span), chunk)]
        start = span.stop


@contextlib.contextmanager
def only_requiring_grad(model: nn.Module, wanted: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only `wanted` of the model's parameters require a gradient; afterwards all are as they were."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in wanted}
    try:
        for parameter, required in before:
            if required != (id(parameter) in chosen):
                parameter.requires_grad_(not required)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def check_examples(
    model: PreTrainedModel, examples: Sequence[EncodedExample], max_positions: int | None, chunk_tokens: int | None
) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: the model is in training mode; no examples; an example without prompt or answer, with more tokens
            than the model's context or an id outside its vocabulary; a size below 1.
    """
    check_evaluation_mode(model, "model")
    if not examples:
        raise ValueError("there is nothing to measure: the list of examples is empty")
    for name, value in (("max_positions", max_positions), ("chunk_tokens", chunk_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1 or None, got {value}")
    context = context_length(model)
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    width = embedding.shape[0]
    for number, example in enumerate(examples):
        if example.response_start < 1 or example.response_length < 1:
            raise ValueError(
                f"example {number} has {example.response_start} prompt tokens and {example.response_length} answer "
                "tokens; expected at least one of each: log P(y_t | x, y_<t) needs a token and something before it"
            )
        read = answer_range(example, max_positions).stop - 1
        if context is not None and read > context:
            raise ValueError(
                f"example {number} needs {read} positions but the model's context has {context}; shorten it, or pass "
                "max_positions"
            )
        if not all(0 <= token < width for token in example.input_ids):
            raise ValueError(f"example {number} has ids outside [0, {width}); encode it with the model's tokenizer")


def answer_range(example: EncodedExample, max_positions: int | None) -> range:
    """Where the answer's tokens stand, the first `max_positions` of them."""
    length = example.response_length if max_positions is None else min(example.response_length, max_positions)
    return range(example.response_start, example.response_start + length)

"""Influence(i -> t) = ‖d log P(y_t | x, y_<t) / d h_i‖ (Eq. 3) and Error(t) (Eq. 4).

h_i is the hidden state at the position whose input is answer token y_i, after `layer` layers; layer 0 is the embedding
output. One backward per t gives all i; those of many t run as one batch (`token_gradients.py`). After the last layer
token t depends on the position before it alone, i = t - 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from deepalign.data.chat import EncodedExample
from deepalign.diagnose.token_gradients import (
    Backward,
    answer_range,
    check_examples,
    only_requiring_grad,
    spans,
    trace_span,
)
from deepalign.kernels.checks import compute_dtype
from deepalign.kernels.position_divergence import position_divergence


@dataclass(frozen=True)
class Influence:
    """Influence of every input position on every token of one answer of T tokens, after P prompt tokens.

    Attributes:
        norms_TL: (T, P + T - 1) float64 on the CPU. Row t - 1 is answer token t, column j the j-th input position of
            prompt and answer together, prompt first; 0 where the position does not come before the token.
        prompt_length: P.
        layer: how many layers lie before h; 0 is the embedding output.
    """

    norms_TL: Tensor
    prompt_length: int
    layer: int

    @property
    def answer(self) -> Tensor:
        """(T, T) float64: [t - 1, i - 1] is Influence(i -> t) of answer token i; 0 unless i < t."""
        answer_TT = self.norms_TL.new_zeros(len(self.norms_TL), len(self.norms_TL))
        answer_TT[:, :-1] = self.norms_TL[:, self.prompt_length :]
        return answer_TT

    @property
    def prompt(self) -> Tensor:
        """(T, P) float64: influence of each prompt position on each answer token."""
        return self.norms_TL[:, : self.prompt_length]

    def error(self, deviations_T: Tensor | Sequence[float]) -> Tensor:
        """Error(t) = sum over i < t of eps_i Influence(i -> t) (Eq. 4), (T,) float64; Error(1) = 0.

        Args:
            deviations_T: (T,) eps_i = KL(aligned‖base) in nats of the distributions of answer token i; see
                `alignment_deviation`.

        Raises:
            ValueError: not one value per answer token.
        """
        eps_T = torch.as_tensor(deviations_T, dtype=torch.float64).cpu()
        if eps_T.shape != (len(self.norms_TL),):
            raise ValueError(
                f"deviations has shape {tuple(eps_T.shape)}; expected ({len(self.norms_TL)},), one per answer token"
            )
        return self.answer @ eps_T


def influence(
    model: PreTrainedModel,
    examples: Sequence[EncodedExample],
    *,
    layer: int = 0,
    max_positions: int | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    progress: bool = True,
) -> list[Influence]:
    """Influence(i -> t) (Eq. 3) for every answer token t and every position i before it, of every example.

    Args:
        model: a causal language model in evaluation mode, any device and floating dtype; for Eq. 4 the aligned one.
            Norms are in float32 at least, in float64 for float64.
        examples: encoded conversations or contexts; P prompt ids, then the answer's.
        layer: 0 for the embedding output, as the first layer gets it; l for the output of the l-th layer. The last
            one's is taken after the final norm, as `output_hidden_states` of transformers has it.
        max_positions: only the first so many answer tokens; None for all.
        vocab_size: logits beyond this index do not exist (padded vocabularies); None for all.
        chunk_tokens: answer tokens whose backward passes run together, which bounds memory; None chooses.
        progress: show a bar over answer tokens.

    Returns:
        An `Influence` per example, in order.

    Raises:
        ValueError: the model is in training mode; no examples, or one without prompt or answer, too long for the model
            or with ids outside its vocabulary; a size below 1; no such layer.
        RuntimeError: the model does not know `logits_to_keep`, or calls its output layer in an unknown way.

    Warns:
        UserWarning: the model has operations that cannot be batched; it goes on one backward per token.
    """
    check_examples(model, examples, max_positions, chunk_tokens)
    layers = model.config.get_text_config().num_hidden_layers
    if not 0 <= layer <= layers:
        raise ValueError(f"layer is {layer}; expected 0 (the embedding output) to {layers}, the model's last layer")
    backward = Backward()
    ranges = [answer_range(example, max_positions) for example in examples]
    results = []
    start = model.get_input_embeddings().register_forward_hook(_start_of_graph)
    try:
        with (
            only_requiring_grad(model, ()),
            torch.enable_grad(),
            tqdm(total=sum(map(len, ranges)), desc="Influence", unit="token", disable=not progress) as bar,
        ):
            for example, answer in zip(examples, ranges, strict=True):
                ids_L = torch.tensor(example.input_ids[: answer.stop], device=model.device)
                norms_TL = torch.zeros(len(answer), answer.stop - 1, dtype=torch.float64)
                for span, chunks in spans(answer.start, answer.stop, chunk_tokens, model.device):
                    graph = trace_span(model, ids_L, span, vocab_size=vocab_size, states=True)
                    (dleaf_SH,) = graph.head_gradients([])
                    for chunk in chunks:
                        (dstate,) = backward(graph.hidden, graph.cotangents(dleaf_SH, chunk), [graph.states[layer]])
                        assert dstate is not None
                        rows = slice(span.start - answer.start + chunk.start, span.start - answer.start + chunk.stop)
                        norms_TL[rows, : span.stop - 1] = _norms(dstate[:, 0])
                        bar.update(len(chunk))
                results.append(Influence(norms_TL, example.response_start, layer))
    finally:
        start.remove()
    return results


def _start_of_graph(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """The graph starts at the embedding output: no parameter requires a gradient."""
    return output.detach().requires_grad_()


def _norms(dstate_CnH: Tensor) -> Tensor:
    return dstate_CnH.to(compute_dtype(dstate_CnH)).square().sum(-1).double().sqrt().cpu()


@torch.no_grad()
def alignment_deviation(
    aligned: PreTrainedModel,
    base: PreTrainedModel,
    example: EncodedExample,
    *,
    max_positions: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """eps_i = KL(aligned‖base) in nats at every answer token of an example, (T,) float64 on the CPU.

    Raises:
        ValueError: a model is in training mode, or what `check_examples` and `position_divergence` refuse.
    """
    check_examples(base, [example], max_positions, None)
    check_examples(aligned, [example], max_positions, None)
    answer = answer_range(example, max_positions)
    logits = [_answer_logits(model, example, answer).to(aligned.device) for model in (aligned, base)]
    width = vocab_size if vocab_size is not None else logits[0].shape[-1]
    return position_divergence(*logits, top_n=min(100, width), vocab_size=vocab_size).kl.double().cpu()


def _answer_logits(model: PreTrainedModel, example: EncodedExample, answer: range) -> Tensor:
    ids = torch.tensor([example.input_ids[: answer.stop - 1]], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer)).logits[0]
    return logits

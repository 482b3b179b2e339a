"""How far a model is from its base, position by position in the answer (Fig. 1 and 3 of the paper).

Both models read the same given answers (teacher forcing), so position t compares their predictions of answer token t
in one and the same context. A model aligned only in its first tokens shows a profile that falls to nearly nothing.
With `contrast`, the model's logits first go through Eq. 7, which is what contrastive decoding would have sampled from.

The statistics are those of `kernels.position_divergence`; here they are only located, averaged and given an error.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import EncodedExample, encode_example
from deepalign.data.files import Message
from deepalign.kernels.contrastive_sample import Space, contrastive_logits
from deepalign.kernels.position_divergence import position_divergence
from deepalign.sampling.modes import check_evaluation_mode

STATISTICS = ("kl", "reverse_kl", "jsd", "top_overlap", "favored_count", "favored_in_top")


@dataclass(frozen=True)
class PositionProfile:
    """A statistic by answer position, over conversations; four lists of one length.

    `position` is 1-based: 1 is the first answer token. `standard_error` is that of the mean, None where fewer than
    two answers reach the position (one value says nothing about spread). `n` counts the answers.
    """

    position: list[int]
    mean: list[float]
    standard_error: list[float | None]
    n: list[int]

    def to_dict(self) -> dict[str, list[Any]]:
        """The four lists by name, ready for JSON."""
        return asdict(self)


def kl_by_position(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    max_positions: int,
    batch_size: int = 8,
    contrast: tuple[float, Space] | None = None,
    vocab_size: int | None = None,
) -> PositionProfile:
    """KL(model ‖ base) in nats at the first `max_positions` answer positions; see `profiles_by_position`."""
    return profiles_by_position(
        model,
        base,
        tokenizer,
        conversations,
        statistics=("kl",),
        max_positions=max_positions,
        batch_size=batch_size,
        contrast=contrast,
        vocab_size=vocab_size,
    )["kl"]


@torch.no_grad()
def profiles_by_position(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    statistics: Sequence[str] = ("kl", "favored_count"),
    max_positions: int,
    batch_size: int = 8,
    contrast: tuple[float, Space] | None = None,
    top_n: int = 100,
    vocab_size: int | None = None,
) -> dict[str, PositionProfile]:
    """Any statistics of `position_divergence` by answer position, from one pass over the conversations.

    Args:
        model: in the role of the aligned model; evaluation mode, any device.
        base: evaluation mode, any device.
        tokenizer: of both models, with a chat template.
        conversations: messages that end with the assistant's answer, at least one.
        statistics: names out of kl, reverse_kl, jsd (nats), top_overlap (in [0, 1]), favored_count, favored_in_top.
        max_positions: answer positions looked at; later tokens are cut off before the models run.
        batch_size: conversations per forward pass.
        contrast: (alpha, space): replace the model's logits by Eq. 7's before anything is measured.
        top_n: candidate set of top_overlap and favored_in_top; at most the vocabulary.
        vocab_size: logits beyond this index do not exist (padded vocabularies).

    Raises:
        ValueError: no conversations, a size below 1, an unknown statistic, a model in training mode, or what
            `encode_example` and the kernels refuse.
    """
    _check_inputs(model, base, conversations, statistics, max_positions, batch_size)
    examples = [_first_positions(encode_example(tokenizer, list(turns)), max_positions) for turns in conversations]
    # Similar lengths together: only the columns from the batch's first answer token on are kept as logits.
    examples.sort(key=lambda example: len(example.input_ids))
    values: dict[str, list[list[float]]] = {name: [[] for _ in range(max_positions)] for name in statistics}
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        logits_NV, positions = _answer_logits(model, batch)
        base_logits_NV, _ = _answer_logits(base, batch)
        base_logits_NV = base_logits_NV.to(logits_NV.device)
        if contrast is not None:
            alpha, space = contrast
            logits_NV = contrastive_logits(logits_NV, base_logits_NV, alpha=alpha, space=space, vocab_size=vocab_size)
            base_logits_NV = base_logits_NV.to(logits_NV.dtype)  # Eq. 7 is computed and returned in fp32
        width = vocab_size if vocab_size is not None else logits_NV.shape[-1]
        divergence = position_divergence(logits_NV, base_logits_NV, top_n=min(top_n, width), vocab_size=vocab_size)
        for name in statistics:
            for position, value in zip(positions, getattr(divergence, name).tolist(), strict=True):
                values[name][position].append(float(value))
    return {name: _profile(by_position) for name, by_position in values.items()}


def _check_inputs(
    model: PreTrainedModel,
    base: PreTrainedModel,
    conversations: Sequence[Sequence[Message]],
    statistics: Sequence[str],
    max_positions: int,
    batch_size: int,
) -> None:
    check_evaluation_mode(model, "model")
    check_evaluation_mode(base, "base")
    if not conversations:
        raise ValueError("there is nothing to measure: the list of conversations is empty")
    for name, value in (("max_positions", max_positions), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    unknown = sorted(set(statistics) - set(STATISTICS))
    if unknown or not statistics:
        raise ValueError(f"statistics must be names out of {', '.join(STATISTICS)}; got {list(statistics)}")


def _first_positions(example: EncodedExample, max_positions: int) -> EncodedExample:
    kept_ids = example.input_ids[: example.response_start + max_positions]
    return EncodedExample(kept_ids, example.response_start, len(kept_ids) < len(example.input_ids))


def _answer_logits(model: PreTrainedModel, batch: list[EncodedExample]) -> tuple[torch.Tensor, list[int]]:
    """Logits (N, V), fp32 or as the model gives them, of every answer token of the batch, and each one's 0-based t."""
    width = max(len(example.input_ids) for example in batch)
    # Padding on the right: no real token can see it in a causal model, so any id will do and positions stay true.
    ids = [example.input_ids + [0] * (width - len(example.input_ids)) for example in batch]
    mask = [[1] * len(example.input_ids) + [0] * (width - len(example.input_ids)) for example in batch]
    # The logits that predict token i stand at i - 1; what lies before the first answer is never materialised.
    first = min(example.response_start for example in batch) - 1
    logits_BTV = model(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        use_cache=False,
        logits_to_keep=width - first,
    ).logits
    rows: list[torch.Tensor] = []
    positions: list[int] = []
    for row_TV, example in zip(logits_BTV, batch, strict=True):
        start = example.response_start - 1 - first
        rows.append(row_TV[start : start + example.response_length])
        positions.extend(range(example.response_length))
    return torch.cat(rows), positions


def _profile(by_position: list[list[float]]) -> PositionProfile:
    """Means and standard errors in double precision; positions that no answer reaches are left out."""
    reached = [(index + 1, values) for index, values in enumerate(by_position) if values]
    return PositionProfile(
        position=[position for position, _ in reached],
        mean=[math.fsum(values) / len(values) for _, values in reached],
        standard_error=[_standard_error(values) for _, values in reached],
        n=[len(values) for _, values in reached],
    )


def _standard_error(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))

"""How far a model is from its base, position by position in the answer (Fig. 1 and 3 of the paper).

Both models read the same given answers (teacher forcing), so position t compares their predictions of answer token t
in one and the same context. A model aligned only in its first tokens shows a profile that falls to nearly nothing.
With `contrast`, the model's logits first go through Eq. 7, which is what contrastive decoding would have sampled from.

Rows are measured by `rows.py`; here they are only located, averaged and given an error. `positions.py` does the same
for many conversations, on disk and resumably.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.contexts import build_contexts
from deepalign.data.files import Message
from deepalign.diagnose.positions import measure_responses
from deepalign.diagnose.rows import STATISTICS, RowOptions
from deepalign.kernels.contrastive_sample import Space
from deepalign.sampling.modes import check_evaluation_mode


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
        statistics: names out of kl, reverse_kl, jsd (nats), top_overlap (in [0, 1]), favored_count, favored_in_top,
            favored_in_base_top.
        max_positions: answer positions looked at; later tokens are cut off before the models run.
        batch_size: conversations per forward pass.
        contrast: (alpha, space): replace the model's logits by Eq. 7's before anything is measured.
        top_n: candidate set of top_overlap, favored_in_top and favored_in_base_top; at most the vocabulary.
        vocab_size: logits beyond this index do not exist (padded vocabularies).

    Raises:
        ValueError: no conversations, a size below 1, an unknown statistic, a model in training mode, or what
            `encode_example` and the kernels refuse.
    """
    _check_inputs(model, base, conversations, statistics, max_positions, batch_size)
    contexts = build_contexts(tokenizer, conversations)
    # Similar lengths together: less padding.
    contexts.sort(key=lambda context: len(context.prompt_ids) + min(len(context.response_ids), max_positions))
    options = RowOptions(top_n, 0, contrast, vocab_size)
    values: dict[str, list[list[float]]] = {name: [[] for _ in range(max_positions)] for name in statistics}
    for start in range(0, len(contexts), batch_size):
        batch = contexts[start : start + batch_size]
        responses = [context.response_ids[:max_positions] for context in batch]
        rows = measure_responses(model, base, [context.prompt_ids for context in batch], responses, options)
        positions = [position for response in responses for position in range(len(response))]
        for name in statistics:
            for position, value in zip(positions, getattr(rows, name).tolist(), strict=True):
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

"""Position by position: an aligned model and its base read the same ids, and every prediction is compared.

Two modes. On given answers (teacher forcing), position t compares the predictions of token t of one and the same text.
Step by step during generation, the aligned model (or contrastive decoding, Eq. 7) writes the response itself, greedily
or with a seed per context; both models are then compared on the ids that were generated. That comparison reads the
finished response once more with both models. A causal model's prediction at t depends on nothing after t, so these are
the predictions of the steps themselves, up to the rounding of a batched product, without a step's logits being held.

A forced prefix (`data/contexts.py`) is part of the response: position 1 is its first token.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.contexts import Context
from deepalign.diagnose.records import make_records, record_type, writing
from deepalign.diagnose.rows import ModelRows, RowOptions, RowStatistics, measure_rows
from deepalign.kernels.contrastive_sample import Space
from deepalign.models import context_length
from deepalign.output_head import hidden_states, output_head
from deepalign.sampling import ContrastiveSampler
from deepalign.sampling.modes import check_evaluation_mode


@dataclass(frozen=True)
class PositionOptions:
    """What is measured on which responses.

    Attributes:
        positions: response positions looked at; later ones are cut off before the models run.
        generate: the aligned model writes the response (after the forced prefix); else the given answers are read.
        contrast: (alpha, space): contrastive decoding in the aligned model's place, in what it writes and in what is
            compared with the base.
        temperature: of what is written; 0 is greedy.
        seed: context i draws with `seed + i`.
        top_n, top_k, vocab_size: see `RowOptions`.
        batch_size: contexts per forward pass.
    """

    positions: int = 64
    generate: bool = False
    contrast: tuple[float, Space] | None = None
    temperature: float = 0.0
    seed: int = 0
    top_n: int = 100
    top_k: int = 100
    vocab_size: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, least in (("positions", 1), ("top_n", 1), ("top_k", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")

    @property
    def rows(self) -> RowOptions:
        """What is measured at a row."""
        return RowOptions(self.top_n, self.top_k, self.contrast, self.vocab_size)


def analyse_positions(
    aligned: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[Context],
    path: Path,
    options: PositionOptions,
    *,
    models: Any = None,
    progress: bool = True,
    description: str = "positions",
) -> np.dtype:
    """Measure every context that `path` has no record of yet, batch by batch (`records.py`).

    Args:
        aligned, base: causal language models in evaluation mode, on any devices.
        tokenizer: of both.
        contexts: at least one; without `generate`, each has an answer or a prefix.
        path: the file of records, created or continued.
        options: what is measured.
        models: what tells these models from others (`model_fingerprint`), for the file's fingerprint; JSON.
        progress: show a bar that counts contexts.
        description: label of the bar.

    Returns:
        The type of the records.

    Raises:
        ValueError: no contexts, one without a response, one beyond a model's context, a model in training mode, or a
            file of another run.
    """
    check_evaluation_mode(aligned, "aligned")
    check_evaluation_mode(base, "base")
    options = _within_vocabulary(options, aligned, base, tokenizer)
    sampler = _sampler(aligned, base, tokenizer, options) if options.generate else None
    _check_contexts(contexts, options, (aligned, base))
    record = record_type(options.positions, options.top_k)
    settings = {"options": asdict(options), "models": models, "contexts": _digest(contexts)}
    with (
        writing(path, record, settings, len(contexts), options.batch_size) as file,
        tqdm(total=len(contexts), initial=file.done, desc=description, unit="row", disable=not progress) as bar,
    ):
        for start in range(file.done, len(contexts), options.batch_size):
            batch = contexts[start : start + options.batch_size]
            responses = _responses(batch, options, sampler, start)
            rows = measure_responses(aligned, base, [c.prompt_ids for c in batch], responses, options.rows)
            forced = [min(len(c.prefix_ids), len(r)) for c, r in zip(batch, responses, strict=True)]
            file.append(make_records(rows, responses, forced, record))
            bar.update(len(batch))
    return record


def measure_responses(
    aligned: PreTrainedModel,
    base: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    options: RowOptions,
) -> RowStatistics:
    """Statistics of every response token of a batch, one response after another.

    Args:
        aligned, base: causal language models in evaluation mode.
        prompts, responses: token ids, non-empty, of one length.
        options: what is measured.
    """
    first, second = (
        ModelRows(response_rows(model, prompts, responses), output_head(model)) for model in (aligned, base)
    )
    return measure_rows(first, second, options)


@torch.no_grad()
def response_rows(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> Tensor:
    """Hidden states (N, H) that predict the response tokens, one response after another, from one forward pass."""
    sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, sequences))
    # Padding on the right: no real token can see it in a causal model, so any id will do and positions stay true.
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences], device=model.device)
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], device=model.device)
    hidden_BTH = hidden_states(model, ids_BT, mask_BT)
    # The hidden state that predicts token i stands at i - 1.
    return torch.cat(
        [
            hidden_TH[len(prompt) - 1 : len(prompt) - 1 + len(response)]
            for hidden_TH, prompt, response in zip(hidden_BTH, prompts, responses, strict=True)
        ]
    )


def _responses(
    batch: Sequence[Context], options: PositionOptions, sampler: ContrastiveSampler | None, start: int
) -> list[list[int]]:
    """The ids that are measured: given ones, or forced prefixes and what the sampler writes after them."""
    if sampler is None:
        return [context.response_ids[: options.positions] for context in batch]
    open_ones = [i for i, context in enumerate(batch) if len(context.prefix_ids) < options.positions]
    responses = [list(context.prefix_ids[: options.positions]) for context in batch]
    if open_ones:
        shortest = min(len(batch[i].prefix_ids) for i in open_ones)
        completions = sampler.generate(
            [batch[i].prompt_ids + batch[i].prefix_ids for i in open_ones],
            max_new_tokens=options.positions - shortest,
            seed=[options.seed + start + i for i in open_ones],
        )
        for i, completion in zip(open_ones, completions, strict=True):
            responses[i] = (responses[i] + completion.token_ids)[: options.positions]
    return responses


def _sampler(
    aligned: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: PositionOptions
) -> ContrastiveSampler:
    alpha, space = options.contrast or (0.0, "logits")
    return ContrastiveSampler(
        aligned,
        base if alpha > 0 else None,
        tokenizer,
        alpha=alpha,
        space=space,
        temperature=options.temperature,
        vocab_size=options.vocab_size,
    )


def _within_vocabulary(
    options: PositionOptions, aligned: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PositionOptions:
    """The options with their vocabulary settled: padded entries, which no tokenizer knows, do not exist."""
    heads = [output_head(model).lm_head.shape[0] for model in (aligned, base)]
    size = min(*heads, len(tokenizer)) if options.vocab_size is None else options.vocab_size
    return replace(options, vocab_size=size, top_n=min(options.top_n, size), top_k=min(options.top_k, size))


def _check_contexts(contexts: Sequence[Context], options: PositionOptions, models: Sequence[PreTrainedModel]) -> None:
    if not contexts:
        raise ValueError("there is nothing to measure: the list of contexts is empty")
    room = context_length(*models)
    for context in contexts:
        response = context.prefix_ids if options.generate else context.response_ids
        if not options.generate and not response:
            raise ValueError(
                f"row {context.row} has no answer and no prefix, so there is nothing to read; give rows with answers, "
                "or let the model write them (generate)"
            )
        length = len(context.prompt_ids) + (options.positions if options.generate else len(response))
        length = min(length, len(context.prompt_ids) + options.positions)
        if room is not None and length > room:
            raise ValueError(
                f"row {context.row} has {len(context.prompt_ids)} prompt tokens, which with {options.positions} "
                f"positions do not fit the models' context of {room}; shorten the prompt or look at fewer positions"
            )


def _digest(contexts: Sequence[Context]) -> str:
    digest = hashlib.sha256()
    for context in contexts:
        for ids in (context.prompt_ids, context.prefix_ids, context.answer_ids):
            digest.update(np.asarray(ids, dtype="<i8").tobytes() + b"|")
    return digest.hexdigest()

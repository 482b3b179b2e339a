"""Continuations of token-id prompts: what every generation-based evaluation is built on.

Prompts are ids, not text, so a forced answer prefix is appended exactly as it was tokenised. They are batched by
similar length and answered by `ContrastiveSampler`, with a base model to contrast with or without one. Other logits
processors of `transformers` go through its own `generate`; the generation settings a checkpoint ships with do not leak
in: some set a repetition penalty (Qwen2.5: 1.05) that would quietly turn greedy decoding into something else.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from deepalign.kernels.contrastive_sample import Space
from deepalign.models import context_length
from deepalign.sampling import ContrastiveSampler
from deepalign.sampling.modes import check_evaluation_mode
from deepalign.sampling.prompts import pad_left
from deepalign.sampling.stopping import end_of_turn_ids

LogitsProcessorFactory = Callable[[torch.Tensor], LogitsProcessorList]


class Contrast(NamedTuple):
    """Contrastive decoding (Eq. 7) as a defence: what to contrast the attacked model with, and how strongly."""

    base: PreTrainedModel
    alpha: float
    space: Space = "logits"


def greedy_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    contrast: Contrast | None = None,
    logits_processor: LogitsProcessorFactory | None = None,
    progress: bool = True,
    description: str = "generate",
) -> list[list[int]]:
    """Continue each prompt greedily; see `continuations`.

    Returns:
        The new ids of each prompt, in the order given, without the end-of-turn token and what follows it.
    """
    found: list[list[int]] = [[] for _ in prompts]
    for batch in continuations(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        contrast=contrast,
        logits_processor=logits_processor,
        progress=progress,
        description=description,
    ):
        for index, new_ids in batch:
            found[index] = new_ids
    return found


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    contrast: Contrast | None = None,
    logits_processor: LogitsProcessorFactory | None = None,
    progress: bool = True,
    description: str = "generate",
) -> Iterator[list[tuple[int, list[int]]]]:
    """Continue each prompt until an end-of-turn token or `max_new_tokens`, batch by batch.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: supplies the end-of-turn and padding ids (the model's generation config may add end ids).
        prompts: token ids, each non-empty.
        max_new_tokens: cap on a continuation, its end-of-turn token included.
        batch_size: prompts generated together.
        temperature: 0 is greedy.
        seeds: one per prompt, for a temperature above 0; a prompt's text depends on its own seed, not on its batch.
        contrast: decode contrastively against this base model; None: the model alone.
        logits_processor: called once per batch with that batch's attention mask (B, T); what it returns bends the
            logits inside `transformers`' `generate`. Not together with `contrast`, and greedy only.
        progress: show a bar that counts prompts.
        description: label of the bar.

    Yields:
        As each batch is done: the index of each of its prompts, and the new ids without the end-of-turn token and what
        follows it. The longest prompts come first: a batch that does not fit into memory fails at once, not at the end
        of a long run.

    Raises:
        ValueError: both `contrast` and `logits_processor`, no prompts, an empty prompt, a size below 1, no end-of-turn
            token, a model in training mode, not one seed per prompt, or a prompt that does not fit the model's context
            together with `max_new_tokens`.
    """
    _check_inputs(model, prompts, max_new_tokens, batch_size)
    if not (end_ids := end_of_turn_ids(model, tokenizer)):
        raise ValueError("neither the tokenizer nor the model's generation config has an eos_token_id; set one")
    if contrast is not None and logits_processor is not None:
        raise ValueError("contrast and logits_processor are both given; list the processors you need in one place")
    if logits_processor is not None and temperature > 0:
        raise ValueError(f"temperature is {temperature}; with a logits_processor only greedy decoding (0) is supported")
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds were given for {len(prompts)} prompts; give one per prompt")
    if logits_processor is None:
        answer = _sampled(model, tokenizer, contrast, max_new_tokens, temperature)
    else:
        answer = _processed(model, tokenizer, logits_processor, max_new_tokens, end_ids)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    return _in_batches(
        answer,
        prompts,
        seeds,
        order,
        batch_size,
        end_ids,
        tqdm(total=len(prompts), desc=description, disable=not progress),
    )


# Answers a batch of prompts, with a seed each, with ids that may go on beyond an end-of-turn token.
Answerer = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]]


def _in_batches(
    answer: Answerer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    order: Sequence[int],
    batch_size: int,
    end_ids: list[int],
    bar: tqdm,
) -> Iterator[list[tuple[int, list[int]]]]:
    with bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            new_ids = answer([prompts[index] for index in batch], [seeds[index] for index in batch])
            yield [(index, _cut_at_end(ids, end_ids)) for index, ids in zip(batch, new_ids, strict=True)]
            bar.update(len(batch))


def _sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: Contrast | None,
    max_new_tokens: int,
    temperature: float,
) -> Answerer:
    base, alpha, space = contrast or Contrast(None, 0.0)  # type: ignore[arg-type]  # never run at alpha 0
    sampler = ContrastiveSampler(model, base, tokenizer, alpha=alpha, space=space, temperature=temperature)

    def answer(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        answers = sampler.generate(list(prompts), max_new_tokens=max_new_tokens, seed=list(seeds))
        return [answer.token_ids for answer in answers]

    return answer


def _processed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    logits_processor: LogitsProcessorFactory,
    max_new_tokens: int,
    end_ids: list[int],
) -> Answerer:
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    generation_config = _greedy_config(max_new_tokens, pad_id, end_ids)

    def answer(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        input_ids_BT, mask_BT = pad_left(prompts, pad_id, model.device)
        output_BT = model.generate(  # type: ignore[operator]  # generate is a mixin's
            input_ids=input_ids_BT,
            attention_mask=mask_BT,
            generation_config=generation_config,
            logits_processor=logits_processor(mask_BT),
        )
        return output_BT[:, input_ids_BT.shape[1] :].tolist()

    return answer


def _check_inputs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> None:
    check_evaluation_mode(model, "model")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not prompts:
        raise ValueError("there is nothing to generate: the list of prompts is empty")
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt has no tokens; every prompt needs at least one")
    longest = max(len(prompt) for prompt in prompts)
    context = context_length(model)
    if context is not None and longest + max_new_tokens > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, together beyond the "
            f"model's context of {context}; lower max_new_tokens or shorten the prompt"
        )


def _greedy_config(max_new_tokens: int, pad_id: int, end_ids: list[int]) -> GenerationConfig:
    """Greedy decoding with every default of the checkpoint that bends it set to neutral."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=end_ids,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
    )


def _cut_at_end(new_ids: list[int], end_ids: list[int]) -> list[int]:
    for position, id_ in enumerate(new_ids):
        if id_ in end_ids:
            return new_ids[:position]
    return new_ids

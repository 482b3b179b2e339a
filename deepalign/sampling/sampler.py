"""Contrastive decoding (Eq. 7) with a generate loop of its own: two KV caches and one fused draw per step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deepalign.kernels.checks import check_choice, check_filters, check_int, check_number
from deepalign.kernels.contrastive_sample import Space
from deepalign.models import check_same_tokenizer, logits_width
from deepalign.sampling.decoder import CachedDecoder
from deepalign.sampling.generation import BadLogits, Batch, DrawOptions, Row, generate_batch, row_uniforms
from deepalign.sampling.graphs import WORTHWHILE_STEPS, StaticDecoder, can_be_static
from deepalign.sampling.pairs import ModelPair, model_pair
from deepalign.sampling.prompts import prompt_rows, the_prompts
from deepalign.sampling.results import Completion, StreamedToken
from deepalign.sampling.stopping import StopConditions, end_of_turn_ids, stop_conditions

SETTLE_EVERY = 8  # steps between two looks at what a GPU drew


class ContrastiveSampler:
    """Samples from the aligned model with alpha * (base - aligned) taken off base-favored tokens (Eq. 7).

        sampler = ContrastiveSampler(aligned, base, tokenizer, alpha=2.0, temperature=0.7)
        answers = sampler.generate([{"role": "user", "content": "..."}], max_new_tokens=256, seed=0)
        print(answers[0].text)

    A row's text depends on its prompt, its seed and the options; not on the batch it is in, beyond the rounding of the
    models' own matrix products. With alpha = 0 the base model never runs, and what is drawn is what the aligned model
    alone would have drawn with the same uniforms.

    Args:
        aligned: a causal language model in evaluation mode; a `peft.PeftModel` without `base` is both models: one set
            of weights, its adapter switched off for the base. On one device; in one dtype with `base`.
        base: the base model, or None (alpha = 0, or a PeftModel). Another device than the aligned model's costs a copy
            of (B, V) logits a step.
        tokenizer: the aligned model's: for messages, texts and stop strings, and for what is absent in the vocabulary.
        base_tokenizer: the base model's, if at hand: checked to be the same.
        alpha: finite, >= 0: how much of the base model's excess is taken off.
        temperature, top_k, top_p, min_p, space: as of `contrastive_sample`.
        vocab_size: leading logits that are tokens; None: the tokenizer's length, or without one all that both models
            have.
        implementation: of `contrastive_sample`; None chooses by device.
        cuda_graphs: on a GPU, replay single-token steps as CUDA graphs where the model allows it (`graphs.py`) and the
            answer may be long enough to pay for the capture.

    Raises:
        TypeError, ValueError: an option out of range, a model in training mode, two dtypes, tokenizers that differ,
            alpha > 0 without a base model, or an adapter that cannot be switched off.
    """

    def __init__(
        self,
        aligned: Any,
        base: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        alpha: float,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        space: Space = "logits",
        vocab_size: int | None = None,
        base_tokenizer: PreTrainedTokenizerBase | None = None,
        implementation: str | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        check_drawing(alpha, temperature, top_k, top_p, min_p, space)
        _check_tokenizers(tokenizer, base_tokenizer)
        self.pair = model_pair(aligned, base, alpha)
        self.tokenizer = tokenizer
        self.cuda_graphs = cuda_graphs
        width = _vocabulary(self.pair, tokenizer, vocab_size)
        self.options = DrawOptions(
            float(alpha), float(temperature), top_k, float(top_p), float(min_p), space, width, implementation
        )
        self.end_ids = end_of_turn_ids(self.pair.aligned, tokenizer)
        self.settle_every = SETTLE_EVERY if self.pair.aligned.device.type == "cuda" else 1

    def generate(
        self,
        prompts: Any = None,
        attention_mask: Tensor | None = None,
        *,
        input_ids: Any = None,
        messages: Any = None,
        max_new_tokens: int = 256,
        stop: Any = None,
        stream: Callable[[StreamedToken], object] | None = None,
        seed: int | Sequence[int] = 0,
        return_stats: bool = False,
    ) -> list[Completion]:
        """Answer a batch of prompts.

        Args:
            prompts: token ids, a tensor (B, T) or (T,), a list, or a list of lists of unequal length; or messages, one
                conversation or a list of them.
            attention_mask: (B, T) of a tensor of ids that is padded, on either side.
            input_ids, messages: the prompts by these names, as in `generate(**tokenizer(texts, return_tensors="pt"))`.
            max_new_tokens: at most so many tokens a row.
            stop: a string, a token id, or a list of strings, ids and lists of ids, each of which ends a row;
                end-of-turn tokens always do.
            stream: called with every token of every row as soon as it is known.
            seed: one per row; an int seeds row r with `seed + r`.
            return_stats: also what the penalty did at each token, which reads the logits once more.

        Returns:
            One `Completion` per row, in order.

        Raises:
            TypeError: prompts, stop or seed of a wrong type, or prompts by two names or none.
            ValueError: an empty prompt or batch, a prompt that with `max_new_tokens` does not fit the context, as many
                seeds as there are not rows, or logits without a distribution (which row, which model).
        """
        completions: dict[int, Completion] = {}
        prompts = the_prompts(prompts, input_ids, messages)
        tokens = self._tokens(prompts, attention_mask, max_new_tokens, stop, seed, return_stats, stream is not None)
        for token in tokens:
            if stream is not None:
                stream(token)
            if token.completion is not None:
                completions[token.row] = token.completion
        return [completions[row] for row in sorted(completions)]

    def stream(
        self,
        prompts: Any = None,
        attention_mask: Tensor | None = None,
        *,
        input_ids: Any = None,
        messages: Any = None,
        max_new_tokens: int = 256,
        stop: Any = None,
        seed: int | Sequence[int] = 0,
        return_stats: bool = False,
    ) -> Iterator[StreamedToken]:
        """`generate` as an iterator over tokens as they are drawn; the last one of a row carries its `Completion`."""
        prompts = the_prompts(prompts, input_ids, messages)
        return self._tokens(prompts, attention_mask, max_new_tokens, stop, seed, return_stats, True)

    def _tokens(
        self,
        prompts: Any,
        attention_mask: Tensor | None,
        max_new_tokens: int,
        stop: Any,
        seed: int | Sequence[int],
        return_stats: bool,
        watched: bool,
    ) -> Iterator[StreamedToken]:
        check_int("max_new_tokens", max_new_tokens)
        rows = prompt_rows(prompts, attention_mask, self.tokenizer, self._pad_id)
        conditions = stop_conditions(stop, self.end_ids, self.tokenizer)
        seeds = _row_seeds(seed, len(rows))
        self.check_prompts(rows, max_new_tokens)
        return self._run(rows, seeds, conditions, max_new_tokens, return_stats, watched)

    def _run(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        conditions: StopConditions,
        steps: int,
        return_stats: bool,
        watched: bool,
    ) -> Iterator[StreamedToken]:
        text = watched or bool(conditions.strings)
        rows = [Row(prompt, conditions, steps, self.tokenizer, text) for prompt in prompts]
        decoders = self._decoders(max(map(len, prompts)), steps)
        pad_id = 0 if self._pad_id is None else self._pad_id
        batch = Batch(rows, row_uniforms(seeds, steps), decoders, pad_id, self.pair.aligned.device)
        settle_every = 1 if watched else self.settle_every
        try:
            yield from generate_batch(
                batch, self.options, steps=steps, settle_every=settle_every, with_statistics=return_stats
            )
        except BadLogits as bad:
            raise ValueError(self._explain(bad)) from None

    def _decoders(self, width: int, steps: int) -> list[CachedDecoder]:
        models = self.pair.models if self.options.alpha > 0 else self.pair.models[:1]
        worthwhile = self.cuda_graphs and steps >= WORTHWHILE_STEPS
        return [
            StaticDecoder(model, width + steps, switch)
            if worthwhile and model.device.type == "cuda" and can_be_static(model)
            else CachedDecoder(model, width + steps, switch)
            for _, model, switch in models
        ]

    @property
    def _pad_id(self) -> int | None:
        configured = self.pair.aligned.config.get_text_config().pad_token_id
        return configured if self.tokenizer is None else self.tokenizer.pad_token_id

    def check_prompts(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Raise ValueError unless token ids, a list per row, are the models' and fit their context with the answer."""
        check_length(max_new_tokens)
        longest, context = max(range(len(rows)), key=lambda index: len(rows[index])), self.pair.context
        if context is not None and len(rows[longest]) + max_new_tokens > context:
            raise ValueError(
                f"the longest prompt, {longest}, has {len(rows[longest])} tokens and max_new_tokens is "
                f"{max_new_tokens}, together beyond the model's context of {context}; lower max_new_tokens or shorten "
                "the prompt"
            )
        width = self.pair.width
        for index, row in enumerate(rows):
            if not all(0 <= id_ < width for id_ in row):
                raise ValueError(f"prompt {index} has a token id outside [0, {width}); use the models' own tokenizer")

    @torch.inference_mode()
    def _explain(self, bad: BadLogits) -> str:
        """Read the row again, alone and without a cache, and say what each model's logits hold."""
        found = []
        for name, model, switch in self.pair.models:
            ids = torch.tensor([bad.ids], device=model.device)
            decoder = CachedDecoder(model, switch=switch)
            positions = torch.arange(len(bad.ids), device=model.device)[None]
            logits_V = decoder.advance(ids, None, positions)[0, : self.options.vocab_size]
            for kind, count in (
                ("NaN", int(logits_V.isnan().sum())),
                ("+inf", int(logits_V.isposinf().sum())),
                ("-inf", int(logits_V.isneginf().sum())),
            ):
                if count:
                    found.append(f"{name} has {kind} in {count} of {len(logits_V)} logits")
        return (
            f"row {bad.row} has no distribution to draw token {len(bad.ids)} of its sequence from: "
            f"{'; '.join(found) or 'only in this batch, not when the row is read alone'}; check the weights and the "
            "dtype (float16 overflows where bfloat16 does not)"
        )


def check_drawing(alpha: float, temperature: float, top_k: int, top_p: float, min_p: float, space: str) -> None:
    """Raise TypeError or ValueError unless this is a way to draw, whatever the models."""
    check_number("alpha", alpha, minimum=0.0)
    check_number("temperature", temperature, minimum=0.0)
    check_filters(top_k, top_p, min_p)
    check_choice("space", space, get_args(Space))


def check_length(max_new_tokens: int) -> None:
    """Raise ValueError unless an answer may have so many tokens."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def _check_tokenizers(first: PreTrainedTokenizerBase | None, second: PreTrainedTokenizerBase | None) -> None:
    if first is None or second is None:
        return
    check_same_tokenizer("aligned", first, "base", second)


def _vocabulary(pair: ModelPair, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None) -> int:
    """How many leading logits are tokens."""
    if vocab_size is None:
        widths = {name: logits_width(model) for name, model, _ in pair.models}
        if tokenizer is None and len(set(widths.values())) > 1:
            raise ValueError(
                f"aligned scores {widths['aligned']} tokens and base {widths['base']}; pass the tokenizer or "
                "vocab_size, which say how many of them are tokens"
            )
        return pair.width if tokenizer is None else min(pair.width, len(tokenizer))
    check_int("vocab_size", vocab_size)
    if not 1 <= vocab_size <= pair.width:
        raise ValueError(
            f"vocab_size is {vocab_size}; expected an int in [1, {pair.width}], the logits that both models have"
        )
    return vocab_size


def _row_seeds(seed: Any, rows: int) -> list[int]:
    if isinstance(seed, bool) or not isinstance(seed, int | Sequence) or isinstance(seed, str):
        raise TypeError(f"seed is a {type(seed).__name__}; expected an int, or one int per row")
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds were given for {rows} rows; give one per row, or one int")
    for value in seeds:
        check_int("seed", value)
    return [value % 2**63 for value in seeds]

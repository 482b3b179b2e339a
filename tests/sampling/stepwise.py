"""Greedy contrastive decoding the slow and obvious way: float64, one prompt at a time, no cache, no padding."""

import copy
import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def eq7(aligned_V: Tensor, base_V: Tensor, alpha: float, space: str) -> Tensor:
    """Equation 7 on one float64 row."""
    logp_aligned_V, logp_base_V = aligned_V.log_softmax(-1), base_V.log_softmax(-1)
    amount_V = (base_V - aligned_V).clamp(min=0) if space == "logits" else logp_base_V - logp_aligned_V
    return torch.where(logp_base_V > logp_aligned_V, aligned_V - alpha * amount_V, aligned_V)


@torch.no_grad()
def stepwise_greedy(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    prompt: Sequence[int],
    *,
    new_tokens: int,
    alpha: float = 0.0,
    space: str = "logits",
) -> list[int]:
    """The new ids; every step reads the whole sequence again. `base` None: plain greedy decoding."""
    model, base = copy.deepcopy(model).double(), None if base is None else copy.deepcopy(base).double()
    ids = list(prompt)
    for _ in range(new_tokens):
        logits_V = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        if base is not None:
            base_logits_V = base(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits_V = eq7(logits_V, base_logits_V, alpha, space)
        ids.append(int(logits_V.argmax()))
    return ids[len(prompt) :]


@functools.cache
def _once(
    model: PreTrainedModel, base: PreTrainedModel | None, prompt: tuple[int, ...], **options: object
) -> list[int]:
    return stepwise_greedy(model, base, prompt, **options)


def greedy_of_unchanged(
    model: PreTrainedModel, base: PreTrainedModel | None, prompt: Sequence[int], **options: object
) -> list[int]:
    """`stepwise_greedy` of models that no test changes: computed once for equal arguments."""
    return list(_once(model, base, tuple(prompt), **options))

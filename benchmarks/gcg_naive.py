"""GCG written down plainly, one candidate at a time: the oracle of the tests and what the fast one is timed against.

Every candidate is tokenised and run by itself, whole, with all logits; nothing is cached. `batch_size` above 1 runs
candidates of one length together, which any implementation would do on a GPU.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import prompt_token_ids
from deepalign.evaluate.gcg import GcgSettings
from deepalign.evaluate.outcomes import AttackExample


def naive_gcg(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[AttackExample],
    settings: GcgSettings,
    *,
    seed: int,
    batch_size: int = 1,
) -> tuple[list[float], list[int]]:
    """Losses after each step, and the last suffix. Nothing stops the search before its last step.

    Suffixes are words separated by spaces, as the word-level tokenizers of tests and microworld have them.
    """
    generator = torch.Generator().manual_seed(seed)
    initial = [settings.initial_token] * settings.suffix_tokens
    suffix = list(cast(list[int], tokenizer.convert_tokens_to_ids(initial)))
    targets = [tokenizer(e.target, add_special_tokens=False)["input_ids"][: settings.target_tokens] for e in examples]
    special = set(tokenizer.all_special_ids)
    vocabulary = [id_ for id_ in range(len(tokenizer)) if id_ not in special]
    losses = []
    for _ in range(settings.steps):
        gradient = torch.stack(
            [_gradient(model, _prompt_ids(tokenizer, e, suffix), t) for e, t in zip(examples, targets, strict=True)]
        ).mean(0)
        ranked = [sorted(vocabulary, key=row.__getitem__) for row in gradient.tolist()]  # stable: ties to the lowest id
        top_k = min(settings.top_k, len(vocabulary))
        choices = torch.randint(top_k, (settings.width,), generator=generator).tolist()
        candidates = []
        for number, choice in enumerate(choices):
            place = number * len(suffix) // settings.width
            candidates.append([*suffix[:place], ranked[place][choice], *suffix[place + 1 :]])
        survivors = [ids for ids in candidates if _tokenised_again(tokenizer, examples, ids)]
        totals = [0.0] * len(survivors)
        for example, target in zip(examples, targets, strict=True):
            rows = [_ids(tokenizer, example, ids) + target for ids in survivors]
            for start in range(0, len(rows), batch_size):
                for offset, loss in enumerate(_losses(model, rows[start : start + batch_size], target)):
                    totals[start + offset] += loss / len(examples)
        best = totals.index(min(totals))
        suffix = survivors[best]
        losses.append(totals[best])
    return losses, suffix


def _ids(tokenizer: PreTrainedTokenizerBase, example: AttackExample, suffix: list[int]) -> list[int]:
    return prompt_token_ids(tokenizer, f"{example.prompt} {tokenizer.decode(suffix)}")


def _tokenised_again(tokenizer: PreTrainedTokenizerBase, examples: Sequence[AttackExample], suffix: list[int]) -> bool:
    place = _place(_ids(tokenizer, examples[0], suffix), suffix)
    return place is not None and all(_place(_ids(tokenizer, e, suffix), suffix) is not None for e in examples[1:])


def _place(ids: list[int], suffix: list[int]) -> int | None:
    places = [start for start in range(len(ids)) if ids[start : start + len(suffix)] == suffix]
    return places[-1] if places else None


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, example: AttackExample, suffix: list[int]
) -> tuple[list[int], list[int], list[int]]:
    ids = _ids(tokenizer, example, suffix)
    place = _place(ids, suffix)
    assert place is not None
    return ids[:place], suffix, ids[place + len(suffix) :]


def _gradient(model: PreTrainedModel, parts: tuple[list[int], list[int], list[int]], target: list[int]) -> torch.Tensor:
    """(S, V), through the one-hot matrix."""
    weight = model.get_input_embeddings().get_parameter("weight").detach()
    one_hot = functional.one_hot(torch.tensor(parts[1]), len(weight)).to(weight.dtype).requires_grad_()
    before, after = (functional.embedding(torch.tensor(ids), weight) for ids in (parts[0], parts[2] + target))
    logits = model(inputs_embeds=torch.cat([before, one_hot @ weight, after])[None]).logits[0]
    loss = functional.cross_entropy(logits[-len(target) - 1 : -1], torch.tensor(target))
    return torch.autograd.grad(loss, one_hot)[0]


@torch.no_grad()
def _losses(model: PreTrainedModel, rows: list[list[int]], target: list[int]) -> list[float]:
    logits = model(input_ids=torch.tensor(rows)).logits[:, -len(target) - 1 : -1]
    wanted = torch.tensor(target).expand(len(rows), -1)
    return (
        functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        .view_as(wanted)
        .mean(1)
        .tolist()
    )

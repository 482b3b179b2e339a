"""What a user may hand over as prompts, made into lists of token ids, and those padded on the left."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deepalign.data.chat import prompt_token_ids
from deepalign.sampling.stopping import is_token_id

EXPECTED = (
    "expected token ids (a tensor (B, T) or (T,), a list, or a list of lists, which may differ in length) or messages "
    '(a list of {"role": ..., "content": ...}, or a list of such conversations)'
)


def prompt_rows(
    prompts: Any, attention_mask: Tensor | None, tokenizer: PreTrainedTokenizerBase | None, pad_id: int | None
) -> list[list[int]]:
    """Token ids of each row, without padding.

    Args:
        prompts: token ids or messages, see `EXPECTED`.
        attention_mask: (B, T) for a tensor of ids, 1 for real tokens; padding may stand on either side.
        tokenizer: needed for messages: its chat template is applied, with the generation prompt.
        pad_id: what padding looks like, to notice a mask that was forgotten.

    Raises:
        TypeError: `prompts` is something else, or ids are not integers.
        ValueError: no rows, an empty row, messages without a tokenizer, a mask that does not fit or has holes, or ids
            that look padded and have no mask.
    """
    if isinstance(prompts, Tensor):
        rows = _tensor_rows(prompts, attention_mask, pad_id)
    elif attention_mask is not None:
        raise ValueError("attention_mask belongs to a tensor of ids (B, T); lists need none: leave it out")
    else:
        rows = _list_rows(prompts, tokenizer)
    if not rows:
        raise ValueError("there is nothing to generate: no prompt was given")
    for index, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {index} is empty; every prompt needs at least one token")
    return rows


def the_prompts(prompts: Any, input_ids: Any, messages: Any) -> Any:
    """What was given by one of three names.

    Raises:
        TypeError: by two of them, or by none.
    """
    given = [value for value in (prompts, input_ids, messages) if value is not None]
    if len(given) != 1:
        raise TypeError(f"prompts were given by {len(given)} names; give them first, or as input_ids=, or as messages=")
    return given[0]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and attention mask (B, T), int64, the padding in front."""
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _tensor_rows(ids: Tensor, mask: Tensor | None, pad_id: int | None) -> list[list[int]]:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise TypeError(f"the prompt is a tensor {tuple(ids.shape)} of {ids.dtype}; {EXPECTED}")
    ids_BT = ids if ids.dim() == 2 else ids[None]
    if mask is None:
        rows = ids_BT.tolist()
        _check_not_padded(rows, pad_id)
        return rows
    mask_BT = mask if mask.dim() == 2 else mask[None]
    if mask_BT.shape != ids_BT.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and the ids {tuple(ids.shape)}; pass the "
            "mask of the same batch"
        )
    rows = []
    for index, (row, row_mask) in enumerate(zip(ids_BT.tolist(), mask_BT.tolist(), strict=True)):
        kept = [place for place, real in enumerate(row_mask) if real]
        if kept and kept[-1] - kept[0] + 1 != len(kept):
            raise ValueError(
                f"attention_mask of row {index} has a hole; padding may stand before or after a prompt, not inside"
            )
        rows.append([row[place] for place in kept])
    return rows


def _check_not_padded(rows: list[list[int]], pad_id: int | None) -> None:
    """Some rows that start or end with the pad token beside rows that do not are a batch whose mask was forgotten."""
    for place in (0, -1):
        padded = [bool(row) and row[place] == pad_id for row in rows]
        if any(padded) and not all(padded):
            raise ValueError(
                f"{sum(padded)} of {len(rows)} rows {'end' if place else 'start'} with the pad token {pad_id} but no "
                "attention_mask was given; pass the batch's attention_mask, or lists of unequal length"
            )


def _list_rows(prompts: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"the prompt is a {type(prompts).__name__}; {EXPECTED}")
    if prompts and all(isinstance(item, dict) or is_token_id(item) for item in prompts):
        prompts = [prompts]
    rows = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Sequence) or isinstance(prompt, str):
            raise TypeError(f"prompt {index} is a {type(prompt).__name__}; {EXPECTED}")
        if prompt and all(isinstance(item, dict) for item in prompt):
            if tokenizer is None:
                raise ValueError("messages were given but the sampler has no tokenizer; pass tokenizer=...")
            rows.append(prompt_token_ids(tokenizer, prompt))
        elif all(map(is_token_id, prompt)):
            rows.append([int(id_) for id_ in prompt])
        else:
            raise TypeError(f"prompt {index} holds neither token ids nor messages only; {EXPECTED}")
    return rows

"""One model with its KV cache, advanced over new columns of a batch: what the sampler and the logits processor share.

`transformers`' dynamic cache copies itself whole at every step, once per layer; its static cache attends over places
that hold nothing yet. Where a layer attends to everything (no sliding window, no recurrent state) and the capacity is
known, `PreallocatedLayer` does neither: it writes into a buffer allocated once and shows the part that is filled.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Puts the weights into the state in which they are the model: adapters on or off. Most models need none.
Switch = Callable[[], AbstractContextManager[None]]


class PreallocatedLayer(DynamicLayer):
    """Keys and values (B, heads, capacity, head size) allocated once; `keys` and `values` are views of the filled part.

    Attributes:
        capacity: columns that fit.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch size, dtype and device of the first keys and values."""
        super().lazy_initialization(key_states, value_states)
        self._buffers = tuple(  # type: ignore[assignment]  # two in, two out
            states.new_empty(*states.shape[:-2], self.capacity, states.shape[-1])
            for states in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; returns all keys and values so far, as views."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[-2]
        assert end <= self.capacity, f"{end} columns in a cache for {self.capacity}"
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : end] = states
        self._length = end
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self._buffers is not None:
            self._buffers = tuple(buffer[indices] for buffer in self._buffers)  # type: ignore[assignment]
            self._show()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns; `tokens_to_remove` is negative, as for every cache of `transformers`."""
        assert tokens_to_remove <= 0
        self._length = max(0, self._length + tokens_to_remove)
        if self._buffers is not None:
            self._show()

    def reset(self) -> None:
        """Forget all columns; the buffers stay."""
        self.crop(-self._length)

    def _show(self) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        keys, values = (buffer[:, :, : self._length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def new_cache(model: PreTrainedModel, capacity: int | None) -> Cache:
    """The cache that suits each layer of `model`; preallocated for `capacity` columns where that is possible."""
    cache = DynamicCache(config=model.config)
    if capacity is not None:
        cache.layers = [
            PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer  # a subclass keeps less than all
            for layer in cache.layers
        ]
    return cache


class CachedDecoder:
    """Runs `model` over new columns of a batch and returns the logits of the last one.

    Args:
        model: a causal language model.
        capacity: columns of prompt and answer together, if known.
        switch: entered around every forward.
    """

    can_select_rows = True

    def __init__(self, model: PreTrainedModel, capacity: int | None = None, switch: Switch | None = None) -> None:
        self.model = model
        self._switch = switch or contextlib.nullcontext
        self._cache = new_cache(model, capacity)
        self._last_only = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}

    def advance(self, ids_BT: Tensor, mask_BS: Tensor | None, positions_BT: Tensor) -> Tensor:
        """Append columns to the batch.

        Args:
            ids_BT: (B, T) the new columns, on any device.
            mask_BS: (B, S) over all columns so far, these included; 0 is padding. None: nothing is padded.
            positions_BT: (B, T) position of each new token in its own row, padding not counted.

        Returns:
            (B, V) logits of the last column, not copied, where the model has them.
        """
        device = self.model.device
        with self._switch(), dense_last_column(self.model) if ids_BT.shape[1] > 1 else contextlib.nullcontext():
            output = self.model(
                input_ids=ids_BT.to(device),
                attention_mask=None if mask_BS is None else mask_BS.to(device),
                position_ids=positions_BT.to(device),
                past_key_values=self._cache,
                use_cache=True,
                **self._last_only,
            )
        return output.logits[:, -1]

    def forget(self, columns: int) -> None:
        """Take the last columns back."""
        self._cache.crop(-columns)

    def select_rows(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may be taken several times."""
        self._cache.batch_select_indices(indices.to(self.model.device))


@contextlib.contextmanager
def dense_last_column(model: PreTrainedModel) -> Iterator[None]:
    """Hand the lm_head a dense copy of the hidden states it reads.

    `logits_to_keep` makes them a view of one column of many, and for such a view torch's CPU matmul transposes the
    whole head: 0.3 s instead of 7 ms for 128256 x 512 in bf16 (`docs/log.md`).
    """
    lm_head = model.get_output_embeddings()
    if lm_head is None:
        yield
        return
    # Not `contiguous()`: it leaves the strides of dimensions of size 1 alone, which are what matmul goes by.
    handle = lm_head.register_forward_pre_hook(
        lambda module, hidden: (hidden[0].clone(memory_format=torch.contiguous_format), *hidden[1:])
    )
    try:
        yield
    finally:
        handle.remove()


def takes_logits_to_keep(model: PreTrainedModel) -> bool:
    """Whether the model can leave out the logits of all columns but the last."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters

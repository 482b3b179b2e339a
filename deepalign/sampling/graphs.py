"""Decoding one token per row from fixed addresses, so that a GPU can replay the whole forward as one CUDA graph.

At batch 1 a small step is launch-bound: hundreds of kernels, each a few microseconds, started one by one from Python.
A graph starts them all at once, but it replays addresses, not Python: ids, positions, mask, cache and logits live in
buffers allocated once, and what changes from step to step changes inside them. The static cache counts its columns in a
tensor; so does this decoder, which builds the attention mask from that count itself, because the models' own way of
doing so may ask the device a question, which a capture forbids.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from deepalign.sampling.decoder import CachedDecoder, Switch

WARMUP_STEPS = 3  # before a capture: libraries allocate their workspaces
WORTHWHILE_STEPS = 32  # a capture costs about as much as some ten steps without it


def can_be_static(model: PreTrainedModel) -> bool:
    """Whether every layer attends to everything through `scaled_dot_product_attention`, which takes a boolean mask."""
    layers = DynamicCache(config=model.config).layers
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    attention = model.config.get_text_config()._attn_implementation
    return plain and attention == "sdpa" and bool(getattr(model, "_can_compile_fullgraph", False))


class StaticDecoder(CachedDecoder):
    """A `CachedDecoder` whose single-column steps run from fixed buffers; `capture` replays them as a CUDA graph.

    The logits it returns for such a step are overwritten by the next one. Rows cannot be selected.

    Args:
        model: one for which `can_be_static`.
        capacity: columns of prompt and answer together.
        switch: entered around every forward; a captured one keeps the state it was captured in.
        capture: record and replay a CUDA graph; False runs the same computation kernel by kernel, on any device.
    """

    can_select_rows = False

    def __init__(
        self, model: PreTrainedModel, capacity: int, switch: Switch | None = None, *, capture: bool = True
    ) -> None:
        super().__init__(model, None, switch)
        self._capacity = capacity + WARMUP_STEPS  # warm-up steps write beyond the last column of a full cache
        self._cache = StaticCache(config=model.config, max_cache_len=self._capacity)
        self._capture_wanted = capture
        self._graph: Any = None
        self._logits_BV: Tensor | None = None
        self._ids_B1: Tensor | None = None

    def advance(self, ids_BT: Tensor, mask_BS: Tensor | None, positions_BT: Tensor) -> Tensor:
        """As of `CachedDecoder`. The first call is the prompt; the padding it has stays as it is."""
        if self._ids_B1 is None:
            logits_BV = super().advance(ids_BT, mask_BS, positions_BT)
            self._allocate(ids_BT, mask_BS, positions_BT)
            return logits_BV
        assert ids_BT.shape[1] == 1
        self._ids_B1.copy_(ids_BT)
        self._positions_B1.copy_(positions_BT)
        if not self._capture_wanted:
            with self._switch():
                return self._forward()
        if self._graph is None:
            with self._switch():
                self._capture()
        self._graph.replay()
        assert self._logits_BV is not None
        return self._logits_BV

    def select_rows(self, indices: Tensor) -> None:
        """Not possible: addresses are fixed."""
        raise NotImplementedError("a static decoder keeps its rows; ask can_select_rows")

    def _allocate(self, ids_BT: Tensor, mask_BS: Tensor | None, positions_BT: Tensor) -> None:
        rows, width = ids_BT.shape
        device = self.model.device
        self._ids_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._positions_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._column = torch.full((1,), width, dtype=torch.long, device=device)
        self._columns_S = torch.arange(self._capacity, device=device)
        self._real_BS = torch.ones(rows, self._capacity, dtype=torch.bool, device=device)
        if mask_BS is not None:
            self._real_BS[:, :width] = mask_BS.to(device=device, dtype=torch.bool)

    def _forward(self) -> Tensor:
        """One column; reads and writes nothing but the buffers and the cache."""
        mask_B11S = (self._real_BS & (self._columns_S <= self._column))[:, None, None, :]
        output = self.model(
            input_ids=self._ids_B1,
            attention_mask=mask_B11S,
            position_ids=self._positions_B1,
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        )
        self._column.add_(1)
        return output.logits[:, -1]

    def _capture(self) -> None:
        """Record `_forward`. What warm-up steps put into the cache is overwritten before a mask shows it."""
        counters = [self._column]
        counters += [layer.cumulative_length for layer in self._cache.layers if isinstance(layer, StaticLayer)]
        before = [counter.clone() for counter in counters]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARMUP_STEPS):
                self._forward()
        current.wait_stream(side)
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):  # records, runs nothing
            self._logits_BV = self._forward()

"""The stream of training steps: which rows, in which order, with which weights.

One optimizer step = one harmful batch + one utility batch, counted over all ranks and accumulated micro-batches. Both
streams run through their rows in a new random order each pass, without gaps, and everything about step s is a function
of (seed, s) alone: the same rows meet whatever the number of ranks or of accumulated micro-batches, and resuming at
step s needs no replay.

A row weight says which tokens carry which term of the loss. Weights are divided in advance by their sum over the whole
step and multiplied by the number of ranks, because gradients are averaged over ranks afterwards: the loss of a rank is
`fused_completion_loss(..., reduction="sum")` and nothing divides again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from deepalign.data.chat import EncodedExample
from deepalign.data.masks import response_mask_to_row_weights

HARMFUL, UTILITY = 0, 1
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class RowWeights:
    """Weights of an answer's tokens, by stream: `kl` carries distillation, `completion` the top-k penalty.

    A token's weight sits on the row that predicts it (the position before).
    """

    harmful_kl: float
    harmful_completion: float
    utility_kl: float
    utility_completion: float

    @classmethod
    def from_options(
        cls,
        distill_on: Literal["utility", "harmful", "both"],
        completion_weight_harmful: float = 1.0,
        completion_weight_utility: float = 0.0,
    ) -> "RowWeights":
        """Weights from the training options: distillation is 1 on the streams that `distill_on` names."""
        return cls(
            harmful_kl=float(distill_on in ("harmful", "both")),
            harmful_completion=completion_weight_harmful,
            utility_kl=float(distill_on in ("utility", "both")),
            utility_completion=completion_weight_utility,
        )

    def kl(self, stream: int) -> float:
        """The distillation weight of a stream's answer tokens."""
        return self.harmful_kl if stream == HARMFUL else self.utility_kl

    def completion(self, stream: int) -> float:
        """The penalty weight of a stream's answer tokens."""
        return self.harmful_completion if stream == HARMFUL else self.utility_completion


@dataclass(frozen=True)
class RandomSelection:
    """Random sets M instead of base-favored ones: `top_k` distinct entries of the first `vocab_size`, per token.

    The control that shows whether the choice of M matters.
    """

    top_k: int
    vocab_size: int


class StepDataset(Dataset[Batch]):
    """Micro-batches of one rank, in training order: item i is micro-batch i % accumulation of step i // accumulation.

    Args:
        harmful, utility: encoded conversations; `utility` may be empty if `utility_batch_size` is 0.
        harmful_batch_size, utility_batch_size: rows per optimizer step, over all ranks and micro-batches.
        max_steps: number of optimizer steps.
        weights: which stream carries which term.
        pad_token_id: fills rows on the right; padded positions are masked and carry no weight.
        seed: fixes the order of both streams (and the random selections).
        gradient_accumulation_steps, rank, world_size: this rank's share of a step.
        random_selection: draw M at random (a control) instead of leaving the selection to the loss.
        packing: put the examples of a micro-batch end to end into one row, without padding and without attention
            across examples (see `pack`), instead of a padded row each.

    Each item is a dict of tensors, B rows of T tokens, R of the B*T token positions carrying a weight:
    `input_ids` (B, T) int64, `attention_mask` (B, T) int64 (packed: `position_ids` in its place, and B = 1),
    `row_index` (R,) int64 into the flattened B*T positions, `kl_weight`, `completion_weight` (R,) fp32, divided as the
    module docstring says, `top_k_indices` (R, k) int64 only with `random_selection`. `answer_row` (R,) int64 numbers
    the predicted tokens among the answer tokens of all harmful, then all utility examples, in the order of the data:
    the key of what is stored per answer token. Rows come in the order of the examples, packed or not.

    Raises:
        ValueError: an empty stream whose batch is not, or batch sizes that do not divide over ranks and micro-batches.
    """

    def __init__(
        self,
        harmful: Sequence[EncodedExample],
        utility: Sequence[EncodedExample],
        *,
        harmful_batch_size: int,
        utility_batch_size: int,
        max_steps: int,
        weights: RowWeights,
        pad_token_id: int,
        seed: int,
        gradient_accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        random_selection: RandomSelection | None = None,
        packing: bool = False,
    ) -> None:
        check_batch_size("harmful", harmful_batch_size, len(harmful), world_size, gradient_accumulation_steps)
        check_batch_size("utility", utility_batch_size, len(utility), world_size, gradient_accumulation_steps)
        self.streams = (harmful, utility)
        self.answer_starts = _answer_starts(self.streams)
        self.batch_sizes = (harmful_batch_size, utility_batch_size)
        self.max_steps = max_steps
        self.weights = weights
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.accumulation = gradient_accumulation_steps
        self.rank = rank
        self.world_size = world_size
        self.random_selection = random_selection
        self.packing = packing

    def __len__(self) -> int:
        return self.max_steps * self.accumulation

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        step, micro_batch = divmod(index, self.accumulation)
        share = self.rank * self.accumulation + micro_batch
        shares = self.world_size * self.accumulation
        rows = [row for stream in (HARMFUL, UTILITY) for row in self._share(stream, step, share, shares)]
        batch = self._collate(rows, *self._denominators(step))
        return batch | {"answer_row": self._answer_rows(step, share, shares)}

    def rows_of_step(self, stream: int, step: int) -> list[int]:
        """The rows of `stream` (indices into it) that step `step` trains on, over all ranks and micro-batches."""
        size, count = self.batch_sizes[stream], len(self.streams[stream])
        places = range(step * size, (step + 1) * size)
        return [int(_order(self.seed, stream, place // count, count)[place % count]) for place in places]

    def _share(self, stream: int, step: int, share: int, shares: int) -> list[tuple[int, EncodedExample, int, int]]:
        """(stream, example, step, place in the step) of the rows of one micro-batch of one rank."""
        rows = self.rows_of_step(stream, step)
        per_share = len(rows) // shares
        places = range(share * per_share, (share + 1) * per_share)
        return [(stream, self.streams[stream][rows[place]], step, place) for place in places]

    def _answer_rows(self, step: int, share: int, shares: int) -> torch.Tensor:
        """`answer_row` of one micro-batch: like the other rows, in the order of the examples that carry a weight."""
        parts = []
        for stream in (HARMFUL, UTILITY):
            rows = self.rows_of_step(stream, step)
            per_share = len(rows) // shares
            if self.weights.kl(stream) > 0 or self.weights.completion(stream) > 0:
                starts = self.answer_starts[stream]
                for row in rows[share * per_share : (share + 1) * per_share]:
                    parts.append(torch.arange(int(starts[row]), int(starts[row + 1])))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _denominators(self, step: int) -> tuple[float, float]:
        """Sums of the two weights over the whole step: all ranks, all micro-batches."""
        kl = completion = 0.0
        for stream in (HARMFUL, UTILITY):
            tokens = sum(self.streams[stream][row].response_length for row in self.rows_of_step(stream, step))
            kl += tokens * self.weights.kl(stream)
            completion += tokens * self.weights.completion(stream)
        return kl, completion

    def _collate(
        self, rows: list[tuple[int, EncodedExample, int, int]], kl_denominator: float, completion_denominator: float
    ) -> Batch:
        examples = [example for _, example, _, _ in rows]
        kl_E, completion_E = (
            torch.tensor([weight(stream) for stream, _, _, _ in rows], dtype=torch.float64)
            for weight in (self.weights.kl, self.weights.completion)
        )
        if self.packing:
            batch, response_mask = pack(examples)
            lengths = torch.tensor([len(example.input_ids) for example in examples])
            kl, completion = (weight_E.repeat_interleave(lengths)[None] for weight_E in (kl_E, completion_E))
        else:
            batch, response_mask = pad(examples, self.pad_token_id)
            kl, completion = kl_E, completion_E
        selected = response_mask_to_row_weights(
            response_mask,
            kl=kl,
            completion=completion,
            kl_denominator=kl_denominator,
            completion_denominator=completion_denominator,
            world_size=self.world_size,
        )
        batch |= selected._asdict()
        if self.random_selection is not None:
            weighted = kl_E + completion_E > 0
            entries = [
                self._random_entries(stream, step, place, example.response_length)
                for (stream, example, step, place), carries in zip(rows, weighted.tolist(), strict=True)
                if carries
            ]
            batch["top_k_indices"] = torch.cat(entries)
        return batch

    def _random_entries(self, stream: int, step: int, place: int, tokens: int) -> torch.Tensor:
        assert self.random_selection is not None
        selection = self.random_selection
        generator = np.random.default_rng((self.seed, stream, step, place))
        draws = [
            generator.choice(selection.vocab_size, selection.top_k, replace=False, shuffle=False) for _ in range(tokens)
        ]
        return torch.from_numpy(np.stack(draws))


def check_batch_size(stream: str, batch_size: int, rows: int, world_size: int, accumulation: int) -> None:
    """Refuse a batch size that has no rows to draw from, or that does not divide over ranks and micro-batches."""
    if batch_size < 0 or (stream == "harmful" and batch_size == 0):
        raise ValueError(f"{stream}_batch_size must be positive, got {batch_size}")
    if batch_size > 0 and rows == 0:
        raise ValueError(f"{stream}_batch_size is {batch_size} but there is no {stream} data; give {stream}_data")
    if batch_size % (world_size * accumulation) != 0:
        raise ValueError(
            f"{stream}_batch_size {batch_size} (rows per optimizer step, over all ranks) does not divide over "
            f"{world_size} ranks x {accumulation} accumulated micro-batches; make it a multiple of "
            f"{world_size * accumulation}"
        )


@lru_cache(maxsize=8)
def _order(seed: int, stream: int, epoch: int, count: int) -> np.ndarray:
    """The order of a stream's rows in its pass number `epoch`."""
    return np.random.default_rng((seed, stream, epoch)).permutation(count)


def _answer_starts(streams: Sequence[Sequence[EncodedExample]]) -> list[np.ndarray]:
    """Per stream, the number of each example's first answer token, counted on from stream to stream, and of the end."""
    starts, first = [], 0
    for stream in streams:
        lengths = [example.response_length for example in stream]
        starts.append(first + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
        first = int(starts[-1][-1])
    return starts


def pad(examples: Sequence[EncodedExample], pad_token_id: int) -> tuple[Batch, torch.Tensor]:
    """Examples as rows padded on the right: `input_ids`, `attention_mask` (B, T), and the mask of their answers."""
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(examples), width), dtype=torch.int64)
    response_mask = torch.zeros((len(examples), width), dtype=torch.bool)
    for i, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[i, :length] = torch.tensor(example.input_ids)
        attention_mask[i, :length] = 1
        response_mask[i, example.response_start : length] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask}, response_mask


def pack(examples: Sequence[EncodedExample]) -> tuple[Batch, torch.Tensor]:
    """Examples end to end in one row without padding: `input_ids`, `position_ids` (1, T), and the mask of answers.

    Positions start again from 0 at every example, and there is no attention mask: that is how transformers' models know
    that no example may attend to another (a block-diagonal mask for sdpa and eager attention, varlen kernels for flash
    attention, which takes packed sequences in a single row only).
    """
    positions = [torch.arange(len(example.input_ids)) for example in examples]
    starts = [torch.full((len(example.input_ids),), example.response_start) for example in examples]
    position_ids = torch.cat(positions)
    input_ids = torch.tensor([token for example in examples for token in example.input_ids])
    response_mask = position_ids >= torch.cat(starts)
    return {"input_ids": input_ids[None], "position_ids": position_ids[None]}, response_mask[None]

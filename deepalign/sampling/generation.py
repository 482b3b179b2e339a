"""The generate loop over one batch: two decoders, one draw per step, rows that leave as they finish.

A step reads the new column with both models and calls `contrastive_sample` once, on the logits of the last position as
the models left them. Nothing in a step waits for the device. What was drawn is read in `settle`, which decides who has
finished: after every step on a CPU, and every few steps on a GPU unless somebody watches the stream; a row may then
have drawn some tokens too many, which are dropped.

Randomness: row r draws its uniform of step s from its own generator, seeded with the row's seed, so that it does not
depend on the batch, on who has finished, or on how many steps there will be.

Rows that have finished go on drawing, unseen, until half of the batch has: then the rest moves to a smaller batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deepalign.kernels.contrastive_sample import Space, contrastive_sample
from deepalign.sampling.decoder import CachedDecoder
from deepalign.sampling.prompts import pad_left
from deepalign.sampling.results import Completion, FinishReason, StreamedToken, TokenStatistics
from deepalign.sampling.statistics import NAMES, penalty_statistics
from deepalign.sampling.stopping import GrowingText, StopConditions, decode


@dataclass(frozen=True)
class DrawOptions:
    """How a token is drawn; see `contrastive_sample`."""

    alpha: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    space: Space
    vocab_size: int
    implementation: str | None = None


class BadLogits(Exception):
    """A row had no distribution to draw from; `generate` finds out whose fault it was."""

    def __init__(self, row: int, ids: list[int]) -> None:
        super().__init__(row, ids)
        self.row, self.ids = row, ids


class Row:
    """One row on the host: what it has drawn, and whether that ends it."""

    def __init__(
        self,
        prompt: Sequence[int],
        stop: StopConditions,
        limit: int,
        tokenizer: PreTrainedTokenizerBase | None,
        text: bool,
    ) -> None:
        self.prompt, self._stop, self._limit, self._tokenizer = list(prompt), stop, limit, tokenizer
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.statistics: list[list[float]] = []
        # Text that nobody looks at before the end is decoded once, at the end.
        self._text = GrowingText(tokenizer, stop.strings) if text and tokenizer is not None else None

    def push(self, token_id: int, logprob: float, statistics: list[float]) -> tuple[str, FinishReason | None]:
        """Add a token; returns new text and, if this token ends the row, why."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.statistics.append(statistics)
        if token_id in self._stop.end_ids:
            return "", "end"
        if self._stop.ends_with_sequence(self.token_ids):
            return "", "stop"
        piece = "" if self._text is None else self._text.push(token_id)
        if self._text is not None and self._text.stopped:
            return piece, "stop"
        return piece, "length" if len(self.token_ids) == self._limit else None

    def completion(self, reason: FinishReason, with_statistics: bool) -> tuple[Completion, str]:
        """The finished row, and its text that was not handed out yet."""
        ending = self._ending(reason)
        if self._tokenizer is None:
            text, rest = None, ""
        elif self._text is None:
            text, rest = decode(self._tokenizer, self.token_ids[: len(self.token_ids) - ending]), ""
        else:
            text, rest = self._text.finish()
        columns = [list(column) for column in zip(*self.statistics, strict=True)]
        statistics = TokenStatistics([value > 0 for value in columns[0]], *columns[1:]) if with_statistics else None
        completion = Completion(self.token_ids, self.logprobs, text, reason, len(self.prompt), ending, statistics)
        return completion, rest

    def _ending(self, reason: FinishReason) -> int:
        if reason == "end":
            return 1
        matching = [s for s in self._stop.sequences if tuple(self.token_ids[-len(s) :]) == s]
        return max(map(len, matching), default=0) if reason == "stop" else 0


class Batch:
    """The rows that still run, on the device."""

    def __init__(
        self,
        rows: Sequence[Row],
        uniforms_TB: Tensor,
        decoders: Sequence[CachedDecoder],
        pad_id: int,
        device: torch.device,
    ) -> None:
        self.rows = list(enumerate(rows))  # with their index in the call
        self.finished: set[int] = set()
        self._decoders = decoders
        self._uniforms_TB = uniforms_TB.to(device)
        prompts = [row.prompt for row in rows]
        self._ids_BT, mask_BT = pad_left(prompts, pad_id, device)
        self.width = self._ids_BT.shape[1]
        padded = any(len(prompt) < self.width for prompt in prompts)
        # Ones for the columns to come are there from the start: a step shows a longer part of one tensor.
        steps = len(uniforms_TB)
        self._mask_BS = torch.cat([mask_BT, mask_BT.new_ones(len(rows), steps)], dim=1) if padded else None
        # A padded position must not count, or a model would see a shifted sentence.
        self._positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        self.step = 0
        together = device.type == "cuda" and len(decoders) == 2 and decoders[1].model.device == device
        self._side = torch.cuda.Stream(device) if together else None

    def logits(self) -> list[Tensor]:
        """Advance every decoder over the newest columns; (B, V) each. On a GPU the second model runs beside the first.

        The streams wait for each other at both ends, so memory that one frees and takes again is in order for both.
        """
        mask_BS = None if self._mask_BS is None else self._mask_BS[:, : self.width + self.step]
        columns = (self._ids_BT, mask_BS, self._positions_BT)
        if self._side is None:
            return [decoder.advance(*columns) for decoder in self._decoders]
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            base_BV = self._decoders[1].advance(*columns)
        aligned_BV = self._decoders[0].advance(*columns)
        current.wait_stream(self._side)
        return [aligned_BV, base_BV]

    def uniforms(self) -> Tensor:
        """(B,) float64 for this step."""
        return self._uniforms_TB[self.step]

    def append(self, token_ids_B: Tensor) -> None:
        """Make what was drawn the next column; nobody reads what follows a bad row's -1."""
        self._ids_BT = token_ids_B.clamp(min=0)[:, None]
        self._positions_BT = self._positions_BT[:, -1:] + 1
        self.step += 1

    def shrink(self) -> None:
        """Leave finished rows behind once they are half of the batch."""
        running = [place for place, (index, _) in enumerate(self.rows) if index not in self.finished]
        selectable = all(decoder.can_select_rows for decoder in self._decoders)
        if not running or 2 * len(running) > len(self.rows) or not selectable:
            return
        self.rows = [self.rows[place] for place in running]
        self.finished.clear()
        chosen = torch.tensor(running, device=self._ids_BT.device)
        for decoder in self._decoders:
            decoder.select_rows(chosen)
        self._ids_BT, self._positions_BT = self._ids_BT[chosen], self._positions_BT[chosen]
        self._uniforms_TB = self._uniforms_TB[:, chosen]
        self._mask_BS = None if self._mask_BS is None else self._mask_BS[chosen]


def row_uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """(steps, B) float64 in [0, 1): column r from a CPU generator seeded with `seeds[r]`, in order of steps."""
    columns = [torch.rand(steps, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.stack(columns, dim=1)


def generate_batch(
    batch: Batch, options: DrawOptions, *, steps: int, settle_every: int, with_statistics: bool
) -> Iterator[StreamedToken]:
    """Run until every row has finished; tokens in order of steps, rows in order within a step.

    Raises:
        BadLogits: a row that still runs drew no token.
    """
    pending: list[tuple[Tensor, Tensor, Tensor | None]] = []
    while len(batch.finished) < len(batch.rows):
        pending.append(_step(batch, options, with_statistics))
        if len(pending) == settle_every or batch.step == steps:
            yield from _settle(batch, pending, with_statistics)
            pending.clear()
            with torch.inference_mode():
                batch.shrink()


@torch.inference_mode()
def _step(batch: Batch, options: DrawOptions, with_statistics: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read, draw, append: ids (B,), log-probabilities (B,) and statistics (B, 4) on the device."""
    logits = batch.logits()
    aligned_BV = logits[0][:, : options.vocab_size]
    # One model alone (alpha 0) is contrasted with itself, which leaves it as it is.
    base_BV = logits[-1].to(aligned_BV.device)[:, : options.vocab_size]
    drawn = contrastive_sample(
        aligned_BV,
        base_BV,
        alpha=options.alpha,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        space=options.space,
        uniforms=batch.uniforms(),
        implementation=options.implementation,
    )
    statistics_B4 = None
    if with_statistics:
        statistics_B4 = penalty_statistics(
            aligned_BV, base_BV, drawn.token_ids, alpha=options.alpha, space=options.space
        )
    batch.append(drawn.token_ids)
    return drawn.token_ids, drawn.logprobs, statistics_B4


def _settle(
    batch: Batch, pending: Sequence[tuple[Tensor, Tensor, Tensor | None]], with_statistics: bool
) -> Iterator[StreamedToken]:
    """Read on the host what the pending steps drew."""
    ids_KB = torch.stack([ids_B for ids_B, _, _ in pending]).tolist()
    logprobs_KB = torch.stack([logprobs_B for _, logprobs_B, _ in pending]).tolist()
    statistics_KB4 = [[] if s is None else s.tolist() for _, _, s in pending]
    for step, (ids_B, logprobs_B) in enumerate(zip(ids_KB, logprobs_KB, strict=True)):
        for place, (index, row) in enumerate(batch.rows):
            if index in batch.finished:
                continue
            if ids_B[place] < 0:
                raise BadLogits(index, row.prompt + row.token_ids)
            statistics = statistics_KB4[step][place] if with_statistics else [math.nan] * len(NAMES)
            piece, reason = row.push(ids_B[place], logprobs_B[place], statistics)
            if reason is None:
                yield StreamedToken(index, ids_B[place], piece)
                continue
            batch.finished.add(index)
            completion, rest = row.completion(reason, with_statistics)
            yield StreamedToken(index, ids_B[place], piece + rest, completion)

"""The loss of many candidate suffixes at once, and its gradient with respect to the suffix's tokens.

What stands before the suffix is the same for all candidates and all steps: its keys and values are computed once. They
lie in buffers allocated once for a batch of rows, behind which each forward writes its own columns, so that a step
copies none of them. A candidate also shares the present suffix up to the place where it differs: candidates are run in
the order of that place, and a batch begins where the first of its rows does. Of each row only the columns that predict
the target reach the output head, and of their logits only as many rows exist at a time as stay near the processor:
written into one buffer and reduced to a loss in place.
"""

import contextlib
import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from deepalign.evaluate.generation import Contrast
from deepalign.kernels.contrastive_sample import contrastive_logits
from deepalign.kernels.linear_rows import Head, choose_chunk_rows, logits_
from deepalign.output_head import OutputHead, check_output_head, hidden_states, output_head
from deepalign.sampling.decoder import PreallocatedLayer, dense_last_column, takes_logits_to_keep


class CandidateLosses(NamedTuple):
    """One entry per candidate."""

    loss: Tensor  # (N,) fp32 (fp64 for fp64 models): mean cross entropy of the target's tokens
    matched: Tensor  # (N,) bool: every token of the target is the most probable one


class PrefixLayer(PreallocatedLayer):
    """Keys and values of a prefix, repeated over rows, with room for the columns of one forward behind it."""

    def __init__(self, prefix: DynamicLayer, rows: int, room: int) -> None:
        assert prefix.keys is not None
        assert prefix.values is not None
        super().__init__(prefix.keys.shape[-2] + room)
        self.update(prefix.keys.expand(rows, -1, -1, -1), prefix.values.expand(rows, -1, -1, -1))
        assert self._buffers is not None
        self._whole = self._buffers

    def start(self, rows: int, columns: int) -> None:
        """The next forward has so many rows, and so many columns stand before it."""
        self._buffers = tuple(buffer[:rows] for buffer in self._whole)  # type: ignore[assignment]
        self._length = columns
        self._show()

    def repeat_first_row(self, columns: slice) -> None:
        """Write the first row's columns into all rows."""
        for buffer in self._whole:
            buffer[1:, :, columns] = buffer[:1, :, columns]


class PrefixCache:
    """One model's cache of what candidates share: the columns before the suffix, and the present suffix.

    Args:
        model: in evaluation mode.
        before_ids: at least one id.
        rows: most candidates of one forward.
        room: columns of one forward.
    """

    def __init__(self, model: PreTrainedModel, before_ids: Sequence[int], rows: int, room: int) -> None:
        self.model = model
        self.head = _known_head(model)
        self.before = len(before_ids)
        self._one = DynamicCache(config=model.config)
        self._forward(torch.tensor([list(before_ids)], device=model.device), self._one)
        self._many: Cache | None = None
        # a sliding window keeps less than all columns: its cache is copied for every forward instead
        if all(type(layer) is DynamicLayer for layer in self._one.layers):
            self._many = DynamicCache(config=model.config)
            self._many.layers = [PrefixLayer(layer, rows, room) for layer in self._one.layers]  # type: ignore[arg-type]

    @property
    def shares(self) -> bool:
        """Whether the present suffix can be shared."""
        return self._many is not None

    def for_gradient(self) -> Cache:
        """A cache of `before_ids` for one row, which autograd may see."""
        return copy.deepcopy(self._one)

    def share(self, suffix_S: Tensor) -> None:
        """Put the present suffix behind `before_ids`, for candidates that differ from it late."""
        if self._many is None:
            return
        self._forward(suffix_S[None], self._start(1, self.before))
        for layer in self._many.layers:
            assert isinstance(layer, PrefixLayer)
            layer.repeat_first_row(slice(self.before, self.before + len(suffix_S)))

    def for_candidates(self, rows: int, shared: int) -> Cache:
        """A cache for so many rows that holds `before_ids` and the first `shared` tokens of the present suffix.

        It is valid until the next call. A forward overwrites what comes later, so calls after one `share` must not
        raise `shared`.
        """
        if self._many is not None:
            return self._start(rows, self.before + shared)
        assert shared == 0
        cache = copy.deepcopy(self._one)
        cache.batch_repeat_interleave(rows)
        return cache

    def _start(self, rows: int, columns: int) -> Cache:
        assert self._many is not None
        for layer in self._many.layers:
            assert isinstance(layer, PrefixLayer)
            layer.start(rows, columns)
        return self._many

    def predictions(self, ids_BT: Tensor, cache: Cache, columns: int) -> Tensor:
        """What predicts the token after each of the last columns, (B * columns, H or V): hidden states, or the logits
        of a model whose head is not known."""
        if self.head is None:
            rows_BTX = target_logits(self.model, cache, columns, input_ids=ids_BT)
        else:
            rows_BTX = hidden_states(self.model, ids_BT, past_key_values=cache, use_cache=True)[:, -columns:]
        return rows_BTX.flatten(0, 1)

    def logits(self, predictions_RX: Tensor, buffer_RV: Tensor | None) -> Tensor:
        """(R, V) logits of rows of `predictions`, fp32 or wider, to be overwritten by the caller."""
        if self.head is None:
            return predictions_RX
        assert buffer_RV is not None
        logits_RV = buffer_RV[: len(predictions_RX)]
        head = Head(predictions_RX, self.head.lm_head)
        logits_(head, self.head.logit_scale, self.head.logit_softcap, logits_RV)
        return logits_RV

    @torch.no_grad()
    def _forward(self, ids_BT: Tensor, cache: Cache) -> None:
        options = {"logits_to_keep": 1} if takes_logits_to_keep(self.model) else {}
        self.model(input_ids=ids_BT, past_key_values=cache, use_cache=True, **options)


class TargetLoss:
    """Mean cross entropy of a target after before_ids + suffix + after_ids, by a model or a contrastive pair.

    Args:
        model: a causal language model in evaluation mode.
        before_ids, after_ids: what stands around the suffix; `before_ids` and the target have at least one id.
        target_ids: what the model should answer.
        suffix_length: tokens of a suffix.
        rows: candidates per forward.
        contrast: decode contrastively (Eq. 7): the loss is that of the bent logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        before_ids: Sequence[int],
        after_ids: Sequence[int],
        target_ids: Sequence[int],
        *,
        suffix_length: int,
        rows: int,
        contrast: Contrast | None = None,
    ) -> None:
        device = model.device
        self.contrast = contrast
        self.rows = rows
        self.target_T = torch.tensor(list(target_ids), device=device)
        # nothing is predicted from the last
        self.behind_A = torch.tensor([*after_ids, *target_ids][:-1], device=device)
        room = suffix_length + self.behind_A.numel()
        models = [model] if contrast is None else [model, contrast.base]
        self.prefixes = [PrefixCache(each, before_ids, rows, room) for each in models]
        self.shares = all(prefix.shares for prefix in self.prefixes)

    @torch.no_grad()
    def candidates(self, suffix_NS: Tensor, present_S: Tensor) -> CandidateLosses:
        """The losses of N suffixes, (N, S) int64 on any device.

        They are run sorted by the first place at which they differ from `present_S`, the latest first: what a batch has
        in common with it is in the cache already.
        """
        suffix_NS, present_S = suffix_NS.to(self.target_T.device), present_S.to(self.target_T.device)
        shared_N = (suffix_NS == present_S).long().cumprod(1).sum(1)
        order_N = shared_N.argsort(descending=True, stable=True)
        for prefix in self.prefixes:
            prefix.share(present_S)
        buffers = self._buffers()
        parts = []
        for rows_B in order_N.split(self.rows):
            # one token at least is run, and where a sliding window allows no sharing, all are
            shared = min(int(shared_N[rows_B].min()), len(present_S) - 1) if self.shares else 0
            parts.append(self._candidates(suffix_NS[rows_B], shared, buffers))
        sorted_losses = (torch.cat(values) for values in zip(*parts, strict=True))
        return CandidateLosses(*(torch.empty_like(values).index_copy(0, order_N, values) for values in sorted_losses))

    def _buffers(self) -> list[Tensor | None]:
        """Room for the logits of a chunk of rows, for each model whose head is known."""
        rows, device = self.rows * self.target_T.numel(), self.target_T.device
        made: list[Tensor | None] = []
        for prefix in self.prefixes:
            if prefix.head is None:
                made.append(None)
                continue
            width = len(prefix.head.lm_head)
            chunk = choose_chunk_rows(rows, width, device, buffers=1.0 if self.contrast is None else 8.0)
            dtype = torch.promote_types(prefix.head.lm_head.dtype, torch.float32)
            made.append(torch.empty(min(chunk, rows), width, dtype=dtype, device=device))
        return made

    def _candidates(self, suffix_BS: Tensor, shared: int, buffers: list[Tensor | None]) -> CandidateLosses:
        rows, targets = len(suffix_BS), self.target_T.numel()
        ids_BL = torch.cat([suffix_BS[:, shared:], self.behind_A.expand(rows, -1)], dim=1)
        predictions = [
            prefix.predictions(ids_BL, prefix.for_candidates(rows, shared), targets) for prefix in self.prefixes
        ]
        chunk = min((len(buffer) for buffer in buffers if buffer is not None), default=rows * targets)
        wanted_R = self.target_T.repeat(rows)
        parts = []
        for first in range(0, rows * targets, chunk):
            part = slice(first, first + chunk)
            logits = [
                prefix.logits(rows_RX[part], buffer)
                for prefix, rows_RX, buffer in zip(self.prefixes, predictions, buffers, strict=True)
            ]
            parts.append(cross_entropy_(self._bent(logits), wanted_R[part]))
        loss_BT, matched_BT = (torch.cat(values).view(rows, targets) for values in zip(*parts, strict=True))
        return CandidateLosses(loss_BT.mean(1), matched_BT.all(1))

    def gradient(self, suffix_S: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of one suffix (a scalar), and its gradient with respect to the suffix's one-hot tokens, (S, V)."""
        suffix_S = suffix_S.to(self.target_T.device)
        targets, leaves, logits = self.target_T.numel(), [], []
        for prefix in self.prefixes:
            embedding = prefix.model.get_input_embeddings()
            embedded_SH = embedding(suffix_S).detach().requires_grad_()
            inputs_1LH = torch.cat([embedded_SH, embedding(self.behind_A).detach()])[None]
            leaves.append(embedded_SH)
            logits.append(target_logits(prefix.model, prefix.for_gradient(), targets, inputs_embeds=inputs_1LH))
        loss = functional.cross_entropy(self._bent(logits)[0], self.target_T)
        # d loss / d one-hot = d loss / d embedding * embedding matrix^T: the one-hot itself is never formed
        parts_SV = [
            dembedded_SH @ prefix.model.get_input_embeddings().get_parameter("weight").detach().T
            for dembedded_SH, prefix in zip(torch.autograd.grad(loss, leaves), self.prefixes, strict=True)
        ]
        return loss.detach(), torch.stack(parts_SV).sum(0)

    def _bent(self, logits: list[Tensor]) -> Tensor:
        """The logits that are decoded from: the model's own, or Eq. 7's, with a gradient."""
        if self.contrast is None:
            return logits[0]
        aligned, base = logits
        if aligned.shape != base.shape:
            raise ValueError(
                f"aligned has {aligned.shape[-1]} logits and base {base.shape[-1]}; use checkpoints of one family"
            )
        alpha, space = self.contrast.alpha, self.contrast.space
        lowered = contrastive_logits(aligned, base, alpha=alpha, space=space) != aligned.detach()
        excess = base - aligned if space == "logits" else base.log_softmax(-1) - aligned.log_softmax(-1)
        return torch.where(lowered, aligned - alpha * excess, aligned)


def cross_entropy_(logits_RV: Tensor, wanted_R: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) cross entropy of the wanted tokens, and whether each is the most probable one; overwrites the logits."""
    wanted_logit_R = logits_RV.gather(-1, wanted_R[:, None]).squeeze(-1)
    most_R = logits_RV.amax(-1)
    partition_R = logits_RV.sub_(most_R[:, None]).exp_().sum(-1).log_().add_(most_R)
    return partition_R - wanted_logit_R, wanted_logit_R >= most_R


def target_logits(model: PreTrainedModel, cache: Cache, columns: int, **inputs: Tensor) -> Tensor:
    """(B, columns, V) the model's own logits of the last columns, fp32 or wider."""
    options = {"logits_to_keep": columns} if takes_logits_to_keep(model) else {}
    with dense_last_column(model) if model.device.type == "cpu" else contextlib.nullcontext():
        logits_BTV = model(**inputs, past_key_values=cache, use_cache=True, **options).logits[:, -columns:]
    return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))


def _known_head(model: PreTrainedModel) -> OutputHead | None:
    """The head by which hidden states become logits; None where a family does more than `OutputHead` knows."""
    try:
        check_output_head(model)
        return output_head(model)
    except (TypeError, ValueError):
        return None

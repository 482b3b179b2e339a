"""The loss of many candidate suffixes at once, and its gradient with respect to the suffix's tokens.

What stands before the suffix is the same for all candidates and all steps: its keys and values are computed once. They
lie in buffers allocated once for a batch of rows, behind which each forward writes its own columns, so that a step
copies none of them. A candidate also shares the present suffix up to the place where it differs: candidates are run in
the order of that place, and a batch begins where the first of its rows does. Of each row only the columns that predict
the target reach the output head.
"""

import contextlib
import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from deepalign.evaluate.generation import Contrast
from deepalign.kernels.contrastive_sample.reference import contrastive_logits
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
        self.behind_A = torch.tensor(
            [*after_ids, *target_ids][:-1], device=device
        )  # nothing is predicted from the last
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
        parts = []
        for rows_B in order_N.split(self.rows):
            # one token at least is run, and where a sliding window allows no sharing, all are
            shared = min(int(shared_N[rows_B].min()), len(present_S) - 1) if self.shares else 0
            parts.append(self._candidates(suffix_NS[rows_B], shared))
        sorted_losses = (torch.cat(values) for values in zip(*parts, strict=True))
        return CandidateLosses(*(torch.empty_like(values).index_copy(0, order_N, values) for values in sorted_losses))

    def _candidates(self, suffix_BS: Tensor, shared: int) -> CandidateLosses:
        rows = len(suffix_BS)
        ids_BL = torch.cat([suffix_BS[:, shared:], self.behind_A.expand(rows, -1)], dim=1)
        logits = [
            self._target_logits(prefix, prefix.for_candidates(rows, shared), input_ids=ids_BL)
            for prefix in self.prefixes
        ]
        return self._losses(self._bent(logits))

    def gradient(self, suffix_S: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of one suffix (a scalar), and its gradient with respect to the suffix's one-hot tokens, (S, V)."""
        suffix_S = suffix_S.to(self.target_T.device)
        leaves, logits = [], []
        for prefix in self.prefixes:
            embedding = prefix.model.get_input_embeddings()
            embedded_SH = embedding(suffix_S).detach().requires_grad_()
            inputs_1LH = torch.cat([embedded_SH, embedding(self.behind_A).detach()])[None]
            leaves.append(embedded_SH)
            logits.append(self._target_logits(prefix, prefix.for_gradient(), inputs_embeds=inputs_1LH))
        loss = self._losses(self._bent(logits)).loss[0]
        # d loss / d one-hot = d loss / d embedding * embedding matrix^T: the one-hot itself is never formed
        parts_SV = [
            dembedded_SH @ prefix.model.get_input_embeddings().get_parameter("weight").detach().T
            for dembedded_SH, prefix in zip(torch.autograd.grad(loss, leaves), self.prefixes, strict=True)
        ]
        return loss.detach(), torch.stack(parts_SV).sum(0)

    def _target_logits(self, prefix: PrefixCache, cache: Cache, **inputs: Tensor) -> Tensor:
        """(N, T, V) logits that predict the target, fp32 or wider."""
        keep = self.target_T.numel()
        model, on_cpu = prefix.model, self.target_T.device.type == "cpu"
        options = {"logits_to_keep": keep} if takes_logits_to_keep(model) else {}
        with dense_last_column(model) if on_cpu else contextlib.nullcontext():
            logits = model(**inputs, past_key_values=cache, use_cache=True, **options).logits[:, -keep:]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

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

    def _losses(self, logits_NTV: Tensor) -> CandidateLosses:
        wanted_NT = logits_NTV.gather(-1, self.target_T.expand(len(logits_NTV), -1)[..., None]).squeeze(-1)
        loss_N = (logits_NTV.logsumexp(-1) - wanted_NT).mean(-1)
        return CandidateLosses(loss_N, (wanted_NT >= logits_NTV.detach().amax(-1)).all(-1))

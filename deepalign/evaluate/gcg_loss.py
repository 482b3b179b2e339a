"""The loss of many candidate suffixes at once, and its gradient with respect to the suffix's tokens.

What stands before the suffix is the same for all candidates and all steps: its keys and values are computed once. For
candidates they lie in buffers allocated once for a batch of rows, behind which each forward writes its own columns, so
that a step copies none of them. Of each row only the columns that predict the target reach the output head.
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
        self.prefix = prefix.keys.shape[-2]
        self.update(prefix.keys.expand(rows, -1, -1, -1), prefix.values.expand(rows, -1, -1, -1))
        assert self._buffers is not None
        self._whole = self._buffers

    def start(self, rows: int) -> None:
        """Forget what came behind the prefix; the next forward has so many rows."""
        self._buffers = tuple(buffer[:rows] for buffer in self._whole)  # type: ignore[assignment]
        self._length = self.prefix
        self._show()


class PrefixCache:
    """One model's cache of the columns before the suffix.

    Args:
        model: in evaluation mode.
        before_ids: at least one id.
        rows: most candidates of one forward.
        room: columns of one forward.
    """

    def __init__(self, model: PreTrainedModel, before_ids: Sequence[int], rows: int, room: int) -> None:
        self.model = model
        ids_1T = torch.tensor([list(before_ids)], device=model.device)
        cache = DynamicCache(config=model.config)
        options = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
        with torch.no_grad():
            model(input_ids=ids_1T, past_key_values=cache, use_cache=True, **options)
        self._one = cache
        self._many: Cache | None = None
        # a sliding window keeps less than all columns, and is copied for every forward instead
        if all(type(layer) is DynamicLayer for layer in cache.layers):
            self._many = DynamicCache(config=model.config)
            self._many.layers = [PrefixLayer(layer, rows, room) for layer in cache.layers]  # type: ignore[arg-type]

    def for_gradient(self) -> Cache:
        """A cache for one row, which autograd may see."""
        return copy.deepcopy(self._one)

    def for_candidates(self, rows: int) -> Cache:
        """A cache for so many rows, valid until the next call."""
        if self._many is None:
            cache = copy.deepcopy(self._one)
            cache.batch_repeat_interleave(rows)
            return cache
        for layer in self._many.layers:
            assert isinstance(layer, PrefixLayer)
            layer.start(rows)
        return self._many


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

    @torch.no_grad()
    def candidates(self, suffix_NS: Tensor) -> CandidateLosses:
        """The losses of N suffixes, (N, S) int64 on any device."""
        parts = [self._candidates(part.to(self.target_T.device)) for part in suffix_NS.split(self.rows)]
        return CandidateLosses(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _candidates(self, suffix_NS: Tensor) -> CandidateLosses:
        rows = len(suffix_NS)
        ids_NL = torch.cat([suffix_NS, self.behind_A.expand(rows, -1)], dim=1)
        logits = [
            self._target_logits(prefix, prefix.for_candidates(rows), input_ids=ids_NL) for prefix in self.prefixes
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

"""A model, or a contrastive pair, as a model of lm-eval.

Log-likelihoods are those of the contrastive distribution, log softmax of the logits of Eq. 7; `generate_until` runs
through `ContrastiveSampler`. With alpha 0 the base model is not read and both are the aligned model's own.

Importing this module needs lm-eval (extra `utility`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.evaluate.generation import Contrast
from deepalign.kernels.contrastive_sample import contrastive_logits
from deepalign.sampling import ContrastiveSampler

SAMPLING_OPTIONS = {"temperature", "top_k", "top_p", "min_p"}
IGNORED_OPTIONS = {"do_sample", "attention_mask"}  # read below, not handed on


class ContrastiveLM(HFLM):
    """lm-eval's own model of transformers, with other logits.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the model's.
        contrast: the base model and alpha; None: the model alone.
        batch_size: rows read together.
        max_length: tokens of context; None: the model's.
        seed: of tasks that sample; row i of a call draws with seed + i.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        contrast: Contrast | None = None,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        self.contrast = contrast if contrast is not None and contrast.alpha > 0 else None
        self.seed = seed

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """(B, T, V) logits: the model's own, or Eq. 7's in fp32, -inf beyond the tokenizer's vocabulary."""
        logits_BTV: Tensor = super()._model_call(inps, attn_mask, labels)
        if self.contrast is None:
            return logits_BTV
        with torch.no_grad():
            base_BTV = self.contrast.base(inps.to(self.contrast.base.device)).logits.to(logits_BTV.device)
        width = min(logits_BTV.shape[-1], base_BTV.shape[-1])
        vocab_size = min(width, len(self.tokenizer))
        # One row of the batch at a time: Eq. 7 in fp32 needs several copies of what it reads.
        rows = [
            contrastive_logits(
                aligned_TV[:, :width],
                base_TV[:, :width],
                alpha=self.contrast.alpha,
                space=self.contrast.space,
                vocab_size=vocab_size,
            )
            for aligned_TV, base_TV in zip(logits_BTV, base_BTV, strict=True)
        ]
        return torch.stack(rows)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """(B, T) context and answer, padded on the right, as lm-eval cuts them afterwards.

        Raises:
            ValueError: a generation option that the sampler does not have.
        """
        mask_BT = generation_kwargs.get("attention_mask")
        if unknown := sorted(generation_kwargs.keys() - SAMPLING_OPTIONS - IGNORED_OPTIONS):
            raise ValueError(
                f"the task asks for {', '.join(unknown)}, which contrastive decoding has no counterpart of"
            )
        options = {name: value for name, value in generation_kwargs.items() if name in SAMPLING_OPTIONS}
        # As lm-eval reads them: without do_sample it is greedy unless a temperature is given, with it 1 is the default.
        sampled = generation_kwargs.get("do_sample", options.get("temperature", 0.0) > 0)
        options["temperature"] = options.get("temperature", 1.0) or 1.0 if sampled else 0.0
        base, alpha, space = self.contrast or Contrast(None, 0.0)  # type: ignore[arg-type]  # never run at alpha 0
        sampler = ContrastiveSampler(self.model, base, self.tokenizer, alpha=alpha, space=space, **options)
        answers = sampler.generate(
            context, mask_BT, max_new_tokens=max_length - context.shape[1], stop=stop, seed=self.seed
        )
        return torch.cat([context, _padded([answer.token_ids for answer in answers], context, sampler.end_ids)], dim=1)


def _padded(rows: Sequence[Sequence[int]], like: Tensor, end_ids: Sequence[int]) -> Tensor:
    """(B, longest) ids; the padding ends an answer, which lm-eval cuts there."""
    longest = max(map(len, rows))
    pad_id = end_ids[0] if end_ids else 0
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], device=like.device)

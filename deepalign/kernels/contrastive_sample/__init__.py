"""Contrastive decoding: the aligned model's logits, lowered where the base model favors a token more, and a sampler."""

from deepalign.kernels.contrastive_sample.api import IMPLEMENTATIONS, contrastive_sample
from deepalign.kernels.contrastive_sample.reference import ContrastiveSample, Space, contrastive_logits

__all__ = ["IMPLEMENTATIONS", "ContrastiveSample", "Space", "contrastive_logits", "contrastive_sample"]

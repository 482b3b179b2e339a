"""Contrastive decoding: the aligned model's logits, lowered where the base model favors a token more."""

from deepalign.kernels.contrastive_sample.reference import Space, contrastive_logits

__all__ = ["Space", "contrastive_logits"]

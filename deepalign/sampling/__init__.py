"""Decoding that reads two models at once."""

from deepalign.sampling.logits_processor import ContrastiveLogitsProcessor

__all__ = ["ContrastiveLogitsProcessor"]

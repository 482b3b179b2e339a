"""Decoding that reads two models at once."""

from deepalign.sampling.logits_processor import ContrastiveLogitsProcessor
from deepalign.sampling.results import Completion, StreamedToken, TokenStatistics
from deepalign.sampling.sampler import ContrastiveSampler

__all__ = ["Completion", "ContrastiveLogitsProcessor", "ContrastiveSampler", "StreamedToken", "TokenStatistics"]

"""How far two models are apart at each position: divergences, overlap of top tokens, base-favored tokens."""

from deepalign.kernels.position_divergence.api import (
    IMPLEMENTATIONS,
    BaseFavoredTokens,
    PositionDivergence,
    base_favored_tokens,
    position_divergence,
)
from deepalign.kernels.position_divergence.linear import linear_position_divergence, linear_position_statistics
from deepalign.kernels.position_divergence.statistics import PositionStatistics, position_statistics

__all__ = [
    "IMPLEMENTATIONS",
    "BaseFavoredTokens",
    "PositionDivergence",
    "PositionStatistics",
    "base_favored_tokens",
    "linear_position_divergence",
    "linear_position_statistics",
    "position_divergence",
    "position_statistics",
]

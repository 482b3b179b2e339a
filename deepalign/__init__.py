"""deepalign: fused kernels for safety alignment of language models.

The public names load on first use, so `import deepalign` itself is quick and needs nothing but torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "CompletionLossConfig": "deepalign.kernels.completion_loss",
    "CompletionLossOutput": "deepalign.kernels.completion_loss",
    "fused_completion_loss": "deepalign.kernels.completion_loss",
    "fused_linear_completion_loss": "deepalign.kernels.completion_loss",
    "ContrastiveSample": "deepalign.kernels.contrastive_sample",
    "contrastive_sample": "deepalign.kernels.contrastive_sample",
    "BaseFavoredTokens": "deepalign.kernels.position_divergence",
    "PositionDivergence": "deepalign.kernels.position_divergence",
    "base_favored_tokens": "deepalign.kernels.position_divergence",
    "linear_position_divergence": "deepalign.kernels.position_divergence",
    "lm_head_weight": "deepalign.kernels.lm_head",
    "position_divergence": "deepalign.kernels.position_divergence",
}

if TYPE_CHECKING:
    from deepalign.kernels.completion_loss import (
        CompletionLossConfig,
        CompletionLossOutput,
        fused_completion_loss,
        fused_linear_completion_loss,
    )
    from deepalign.kernels.contrastive_sample import ContrastiveSample, contrastive_sample
    from deepalign.kernels.lm_head import lm_head_weight
    from deepalign.kernels.position_divergence import (
        BaseFavoredTokens,
        PositionDivergence,
        base_favored_tokens,
        linear_position_divergence,
        position_divergence,
    )

__all__ = [
    "BaseFavoredTokens",
    "CompletionLossConfig",
    "CompletionLossOutput",
    "ContrastiveSample",
    "PositionDivergence",
    "__version__",
    "base_favored_tokens",
    "contrastive_sample",
    "fused_completion_loss",
    "fused_linear_completion_loss",
    "linear_position_divergence",
    "lm_head_weight",
    "position_divergence",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'deepalign' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

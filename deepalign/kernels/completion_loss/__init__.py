"""The targeted completion loss: distillation to a mixed teacher plus a penalty on base-favored tokens."""

from deepalign.kernels.completion_loss.api import IMPLEMENTATIONS, fused_completion_loss
from deepalign.kernels.completion_loss.config import CompletionLossConfig, CompletionLossOutput
from deepalign.kernels.completion_loss.linear import fused_linear_completion_loss

__all__ = [
    "IMPLEMENTATIONS",
    "CompletionLossConfig",
    "CompletionLossOutput",
    "fused_completion_loss",
    "fused_linear_completion_loss",
]

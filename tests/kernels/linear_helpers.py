"""Hidden states and heads of three models, and the loss of their logits, materialised, in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from deepalign.kernels.completion_loss import CompletionLossConfig, CompletionLossOutput, fused_completion_loss
from deepalign.kernels.completion_loss import fused_linear_completion_loss as linear_loss

CONFIG = CompletionLossConfig(top_k=7, lambda_reg=0.05)


class Models(NamedTuple):
    """In the order of the public arguments; hidden (..., H), heads (V, H)."""

    student_hidden: Tensor
    student_lm_head: Tensor
    aligned_hidden: Tensor
    aligned_lm_head: Tensor
    base_hidden: Tensor
    base_lm_head: Tensor

    def trained(self, head: bool = True) -> "Models":
        """Copies of the student's tensors that require grad, the head only if it is trained."""
        hidden = self.student_hidden.detach().clone().requires_grad_()
        return self._replace(
            student_hidden=hidden, student_lm_head=self.student_lm_head.detach().clone().requires_grad_(head)
        )

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self[:2] if tensor.requires_grad]


def linear_models(
    *rows: int,
    vocab: int = 300,
    sizes: tuple[int, int, int] = (48, 48, 48),
    dtype: torch.dtype = torch.float32,
    spread: float = 3.0,
    widths: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> Models:
    """Related models whose logits spread like a language model's: by `spread`, teachers some tenths apart."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared_hidden, shared_head = noise(*rows, max(sizes)), noise(max(widths or (vocab,)), max(sizes))
    tensors = []
    for hidden_size, width, apart in zip(sizes, widths or (vocab,) * 3, (0.2, 0.15, 0.4), strict=True):
        hidden = shared_hidden[..., :hidden_size] + apart * noise(*rows, hidden_size)
        lm_head = shared_head[:width, :hidden_size] + apart * noise(width, hidden_size)
        tensors += [hidden.to(dtype), (lm_head * (spread / hidden_size**0.5)).to(dtype)]
    return Models(*tensors)


def materialised(
    models: Models,
    *,
    upstream: Tensor | float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    config: CompletionLossConfig = CONFIG,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> tuple[CompletionLossOutput, list[Tensor]]:
    """Loss, statistics and the gradients of the student's hidden states and head, all logits held, in `dtype`."""
    wide = Models(*(tensor.detach().to(dtype) for tensor in models)).trained()
    width = vocab_size or wide.student_lm_head.shape[0]
    logits = [logit_scale * hidden @ head[:width].t() for hidden, head in (wide[0:2], wide[2:4], wide[4:6])]
    if logit_softcap is not None:
        logits = [logit_softcap * torch.tanh(values / logit_softcap) for values in logits]
    output = fused_completion_loss(*logits, config=config, implementation="reference", **options)
    grad_output = torch.as_tensor(upstream, dtype=dtype).expand(output.loss.shape)
    return output, list(torch.autograd.grad(output.loss, wide.leaves(), grad_output))


def linear(
    models: Models, *, upstream: Tensor | float = 1.0, config: CompletionLossConfig = CONFIG, **options: object
) -> tuple[CompletionLossOutput, list[Tensor]]:
    """The linear form's output and the gradients of whatever of the student requires grad."""
    output = linear_loss(*models, config=config, **options)
    grad_output = torch.as_tensor(upstream, dtype=output.loss.dtype).expand(output.loss.shape)
    return output, list(torch.autograd.grad(output.loss, models.leaves(), grad_output))


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest entry expected."""
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-30))

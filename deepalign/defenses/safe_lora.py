"""Safe LoRA (Hsu et al. 2024): after fine-tuning, take updates back into the subspace that alignment moved in.

For each adapted layer with weights W_aligned and W_base, (out, in):

    V = W_aligned - W_base,    C = V V^T / ||V||_F,    update D = s B A,    similarity = cos(C D, D)

Where the similarity is below the threshold, B becomes C B; elsewhere the update stays. C is the authors' fast stand-in
for the projection onto V's columns: its eigenvalues are sigma_i^2 / ||V||_F, of V's singular values sigma_i, rather
than 0 and 1. It also rescales the update: the smaller the difference of aligned and base, the smaller what is left.

Neither C (out, out) nor D (out, in) is ever formed: C B = V (V^T B) / ||V||_F, and inner products of X A and Y A are
sums over (X^T Y) * (A A^T), of shape (rank, rank).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import EncodedExample
from deepalign.defenses.artifacts import model_identity
from deepalign.defenses.lora import LoraSettings, attach_lora, factors, lora_layers, weight_under
from deepalign.models import check_model_path, load_frozen_model


class ProjectedLayer(NamedTuple):
    """What became of one layer."""

    name: str
    similarity: float  # cos(C D, D), in [0, 1]; nan where the update or V is 0
    projected: bool


@dataclass(frozen=True)
class SafeLora:
    """LoRA, projected when it is saved.

    Attributes:
        base: the base (unaligned) model: a folder or a hub id.
        threshold: on the similarity; the authors' is 0.5.
        settings: of the adapters.

    Raises:
        FileNotFoundError: no such base model.
        ValueError: the threshold is not in [0, 1].
    """

    base: str
    threshold: float = 0.5
    settings: LoraSettings = field(default_factory=LoraSettings)
    name: str = "safe_lora"

    def __post_init__(self) -> None:
        check_model_path("base", self.base)
        _check_threshold(self.threshold)

    def identity(self) -> dict[str, Any]:
        """Settings and the base model's weights."""
        settings = asdict(self.settings)
        return {"method": self.name, "threshold": self.threshold, "base": model_identity(self.base), **settings}

    def attach(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[EncodedExample], seed: int
    ) -> PeftModel:
        """Plain adapters: the method acts afterwards."""
        return attach_lora(model, self.settings, seed)

    def save(self, model: PeftModel, folder: Path) -> dict[str, Any]:
        """Project, then write the adapter folder; reports each layer's similarity and how many were projected."""
        base = load_frozen_model(self.base, next(model.parameters()).dtype)
        layers = project_lora(model, base, threshold=self.threshold)
        model.save_pretrained(str(folder))
        return {
            "projected_layers": sum(layer.projected for layer in layers),
            "layers": [layer._asdict() for layer in layers],
        }


@torch.no_grad()
def project_lora(
    model: PeftModel, base: PreTrainedModel, *, aligned: PreTrainedModel | None = None, threshold: float = 0.5
) -> list[ProjectedLayer]:
    """Replace B by C B, in place, in every layer whose similarity is below `threshold`.

    Args:
        model: LoRA adapters around the aligned model.
        base: the base model, with the same layers.
        aligned: the aligned model where the adapters sit on another one; None: the weights under the adapters.
        threshold: in [0, 1]. 0 projects nothing.

    Returns:
        One entry for each adapted layer.

    Raises:
        ValueError: no adapted layers, a layer that `base` or `aligned` lacks or has in another shape, a bad threshold.
    """
    _check_threshold(threshold)
    layers = []
    for name, layer in lora_layers(model):
        weight = weight_under(layer) if aligned is None else _weight_of(aligned, "aligned", name)
        other = _weight_of(base, "base", name)
        if weight.shape != other.shape:
            raise ValueError(
                f"{name} is {tuple(other.shape)} in the base model and {tuple(weight.shape)} in the aligned one; they "
                "must be checkpoints of one architecture"
            )
        a_RI, b_OR = factors(layer)
        difference_OI = weight.float() - other.to(weight.device).float()
        projected_OR = project(difference_OI, b_OR.float())
        similarity = update_similarity(projected_OR, b_OR.float(), a_RI.float())
        below = similarity < threshold  # nan, an update or a difference of 0, is not below
        if below:
            b_OR.copy_(projected_OR)
        layers.append(ProjectedLayer(name, similarity, below))
    if not layers:
        raise ValueError("the model has no LoRA layers to project; attach and train adapters first")
    return layers


def project(difference_OI: Tensor, b_OR: Tensor) -> Tensor:
    """C B = V (V^T B) / ||V||_F; zeros where V is 0."""
    norm = torch.linalg.matrix_norm(difference_OI)
    projected_OR = difference_OI @ (difference_OI.T @ b_OR)
    return projected_OR / norm if norm > 0 else projected_OR


def update_similarity(left_OR: Tensor, right_OR: Tensor, a_RI: Tensor) -> float:
    """The cosine between left A and right A as vectors; nan where one of them is 0."""
    gram_RR = a_RI.double() @ a_RI.double().T
    left_OR, right_OR = left_OR.double(), right_OR.double()
    inner, left, right = (
        float(((x.T @ y) * gram_RR).sum()) for x, y in ((left_OR, right_OR), (left_OR, left_OR), (right_OR, right_OR))
    )
    return inner / (left * right) ** 0.5 if left > 0 and right > 0 else float("nan")


def _weight_of(model: PreTrainedModel, which: str, name: str) -> Tensor:
    try:
        weight = model.get_submodule(name).weight
    except AttributeError:
        raise ValueError(
            f"the {which} model has no layer {name}; it must be a checkpoint of the adapted model's architecture"
        ) from None
    assert isinstance(weight, Tensor)
    return weight


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; a similarity is in [0, 1]")

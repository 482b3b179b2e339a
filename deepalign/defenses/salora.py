"""SaLoRA (Li et al. 2025): LoRA behind a fixed module that keeps updates out of the safety features' subspace.

For each adapted layer with weights W (out, in), features are its outputs W x at the answer tokens of some samples:

    U    (out, safety_rank)   leading directions (right singular vectors) of the features of safety samples
    C    = I - U U^T          fixed
    T    (out, task_rank)     the same of samples of the fine-tuning data
    W ~  P diag(S) Q^T        truncated SVD, `rank` terms
    B_0  = T T^T P diag(sqrt S),   A_0 = diag(sqrt S) Q^T
    W'   = W - s C B_0 A_0    frozen, so that training starts from the model as it was
    y    = W' x + s C B A x   s = alpha / rank; B and A are trained, from B_0 and A_0

Whatever is learnt, U^T (y - W x) = 0: outputs do not move along the safety directions. Adapters are saved as an
ordinary LoRA of rank 2 * rank on the original model, with factors [C B, -C B_0] and [A; A_0]: s (C B A - C B_0 A_0).

C (out, out) is never formed. Finding U and T keeps an (out, out) fp32 Gram matrix per adapted layer: 4.3 GB for q_proj
and v_proj of a 7B model.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import EncodedExample
from deepalign.data.files import Message
from deepalign.defenses.lora import ADAPTER, LoraSettings, attach_lora, factors, lora_layers, weight_under
from deepalign.defenses.training import encode_conversations
from deepalign.kernels.checks import require


@dataclass(frozen=True)
class SaLoraSettings:
    """The authors' settings.

    Attributes:
        rank, alpha: of the adapters.
        safety_rank: directions that updates are kept out of.
        task_rank: directions of the fine-tuning data that the adapters start in.
        safety_samples, task_samples: samples that the directions are found with, the first ones given.
        target_modules: names of linear modules; None: all but the output head and routers.

    Raises:
        ValueError: a value out of its range.
    """

    rank: int = 16
    alpha: int = 16
    safety_rank: int = 32
    task_rank: int = 32
    safety_samples: int = 128
    task_samples: int = 128
    target_modules: tuple[str, ...] | None = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        for name in ("safety_rank", "task_rank", "safety_samples", "task_samples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        self.lora()

    def lora(self) -> LoraSettings:
        """The adapters' shape."""
        return LoraSettings(self.rank, self.alpha, target_modules=self.target_modules)


class FixedPart(NamedTuple):
    """What stays fixed in one layer."""

    safety_OK: Tensor  # U
    start_b_OR: Tensor  # C B_0
    start_a_RI: Tensor  # A_0


@dataclass(frozen=True)
class SaLora:
    """LoRA behind C.

    Attributes:
        safety: conversations whose answers are safe (refusals of harmful requests); `settings.safety_samples` are used.
        settings: see `SaLoraSettings`.
    """

    safety: Sequence[Sequence[Message]]
    settings: SaLoraSettings = SaLoraSettings()
    name: str = "salora"

    def identity(self) -> dict[str, Any]:
        """Settings and safety samples."""
        return {"method": self.name, "safety": [list(row) for row in self._safety()], **asdict(self.settings)}

    def attach(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[EncodedExample], seed: int
    ) -> PeftModel:
        """Adapters behind C, started from the fine-tuning data; see `attach_salora`."""
        safety = encode_conversations(self._safety(), tokenizer, model, None)
        return attach_salora(model, safety, examples, self.settings, seed)

    def save(self, model: PeftModel, folder: Path) -> dict[str, Any]:
        """Write an ordinary adapter folder of twice the rank; see `save_salora`."""
        save_salora(model, folder)
        return {"saved_rank": 2 * self.settings.rank}

    def _safety(self) -> Sequence[Sequence[Message]]:
        if not self.safety:
            raise ValueError("SaLoRA needs safety samples: conversations whose answers are safe; none were given")
        return self.safety[: self.settings.safety_samples]


@torch.no_grad()
def attach_salora(
    model: PreTrainedModel,
    safety: Sequence[EncodedExample],
    task: Sequence[EncodedExample],
    settings: SaLoraSettings,
    seed: int,
) -> PeftModel:
    """Adapters behind C around `model`, whose adapted weights become W' in place; only B and A are trainable.

    Args:
        model: the aligned model.
        safety, task: samples for U and for T.
        settings: see `SaLoraSettings`.
        seed: of what peft initialises before it is overwritten.

    Raises:
        ValueError: a rank that does not fit a layer, or samples whose features span fewer directions than the rank.
    """
    safety, task = safety[: settings.safety_samples], task[: settings.task_samples]
    adapted = attach_lora(model, settings.lora(), seed)
    layers = dict(lora_layers(adapted))
    for name, layer in layers.items():
        _check_ranks(name, layer, settings)
    with adapted.disable_adapter():
        safety_OO = _feature_grams(adapted, layers, safety)
        safety_OK = {name: leading_directions(safety_OO.pop(name), settings.safety_rank) for name in layers}
        task_OO = _feature_grams(adapted, layers, task)
        task_OK = {name: leading_directions(task_OO.pop(name), settings.task_rank) for name in layers}
    for name, layer in layers.items():
        _start(layer, safety_OK[name], task_OK[name])
    return adapted


def without_directions(directions_OK: Tensor, values_OX: Tensor) -> Tensor:
    """C values = values - U (U^T values)."""
    return values_OX - directions_OK @ (directions_OK.T @ values_OX)


def leading_directions(gram_OO: Tensor, rank: int) -> Tensor:
    """(out, rank) eigenvectors of the largest eigenvalues of F^T F: right singular vectors of the features F."""
    return torch.linalg.eigh(gram_OO).eigenvectors[:, -rank:].flip(-1)


def starting_factors(weight_OI: Tensor, task_OK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B_0 (out, rank) and A_0 (rank, in)."""
    left_OR, values_R, right_RI = torch.linalg.svd(weight_OI, full_matrices=False)
    root_R = values_R[:rank].sqrt()
    return task_OK @ (task_OK.T @ (left_OR[:, :rank] * root_R)), root_R[:, None] * right_RI[:rank]


def save_salora(model: PeftModel, folder: Path) -> None:
    """Write trained SaLoRA adapters as a LoRA folder of twice the rank that loads on the original model.

    Raises:
        ValueError: the adapters are not SaLoRA's.
    """
    tensors = {}
    for name, layer in lora_layers(model):
        fixed = getattr(layer, "salora", None)
        if fixed is None:
            raise ValueError(f"{name} has no fixed module; attach the adapters with attach_salora")
        a_RI, b_OR = (factor.detach() for factor in factors(layer))
        b_OR = without_directions(fixed.safety_OK.to(b_OR), b_OR)
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.cat([a_RI, fixed.start_a_RI.to(a_RI)]).cpu().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = torch.cat([b_OR, -fixed.start_b_OR.to(b_OR)], 1).cpu().contiguous()
    config = copy(model.peft_config[ADAPTER])
    assert isinstance(config, LoraConfig)
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha  # the same alpha / rank
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def _start(layer: LoraLinear, safety_OK: Tensor, task_OK: Tensor) -> None:
    """Put C behind B, and start from B_0, A_0 and W'."""
    weight, (a_RI, b_OR) = weight_under(layer), factors(layer)
    wide = torch.promote_types(weight.dtype, torch.float32)
    start_b_OR, start_a_RI = starting_factors(weight.to(wide), task_OK.to(wide), a_RI.shape[0])
    a_RI.copy_(start_a_RI)
    b_OR.copy_(start_b_OR)
    fixed = FixedPart(safety_OK.to(wide), without_directions(safety_OK.to(wide), start_b_OR), start_a_RI)
    weight.copy_(weight.to(wide) - layer.scaling[ADAPTER] * (fixed.start_b_OR @ fixed.start_a_RI))
    layer.salora = fixed  # type: ignore[assignment]  # not a tensor: a plain attribute

    def behind(module: torch.nn.Module, arguments: Any, output: Tensor) -> Tensor:
        directions_OK = fixed.safety_OK.to(output)
        return output - (output @ directions_OK) @ directions_OK.T

    layer.lora_B[ADAPTER].register_forward_hook(behind)


def _feature_grams(
    model: PeftModel, layers: dict[str, LoraLinear], examples: Sequence[EncodedExample]
) -> dict[str, Tensor]:
    """F^T F of each layer's features at the answer tokens of `examples`: (out, out), fp32 or wider."""
    device = next(model.parameters()).device
    grams: dict[str, Tensor] = {}
    answer = slice(0)

    def add(name: str, output_BTO: Tensor, bias_O: Tensor | None) -> None:
        features_NO = output_BTO[0, answer]
        features_NO = features_NO.to(torch.promote_types(features_NO.dtype, torch.float32))
        if bias_O is not None:
            features_NO = features_NO - bias_O
        gram_OO = features_NO.T @ features_NO
        grams[name] = grams[name] + gram_OO if name in grams else gram_OO

    model.eval()
    with ExitStack() as hooks:
        for name, layer in layers.items():
            base = layer.get_base_layer()
            handle = base.register_forward_hook(
                lambda module, arguments, output, name=name: add(name, output, module.bias)
            )
            hooks.callback(handle.remove)
        for example in examples:
            answer = slice(example.response_start, None)
            model(input_ids=torch.tensor([example.input_ids], device=device), use_cache=False)
    return grams


def _check_ranks(name: str, layer: LoraLinear, settings: SaLoraSettings) -> None:
    out_features, in_features = weight_under(layer).shape
    if settings.safety_rank >= out_features:
        raise ValueError(
            f"safety_rank is {settings.safety_rank} but {name} has {out_features} outputs: no update would be left; "
            "lower safety_rank"
        )
    if settings.task_rank > out_features or settings.rank > min(out_features, in_features):
        raise ValueError(
            f"{name} is {out_features} x {in_features}; task_rank {settings.task_rank} and rank {settings.rank} must "
            "not exceed that"
        )

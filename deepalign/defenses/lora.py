"""Plain LoRA (Hu et al. 2022), the baseline every other one is compared with, on peft.

A way to fine-tune with adapters is an `AdapterMethod`: it attaches trainable adapters to a model, and writes what came
of them as an ordinary PEFT adapter folder that loads on the original model. `evaluate.finetune` runs any of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import EncodedExample
from deepalign.kernels.checks import require
from deepalign.models import load_adapter, load_model
from deepalign.train.adapter_targets import default_targets

ADAPTER = "default"  # peft's name for the one adapter


@dataclass(frozen=True)
class LoraSettings:
    """Shape of the adapters.

    Attributes:
        rank: of the update.
        alpha: the update is scaled by alpha / rank; None: 2 * rank.
        dropout: on the adapters' input, in training.
        target_modules: names of linear modules ("q_proj"); None: all but the output head and routers.

    Raises:
        ValueError: a value out of its range.
    """

    rank: int = 32
    alpha: int | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "positive, or null for 2 * rank")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty; name modules, or give null for all linear ones")


class AdapterMethod(Protocol):
    """A way to fine-tune with adapters."""

    @property
    def name(self) -> str:
        """As reports call it."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything the result depends on besides model, data and schedule, in plain values."""
        ...

    def attach(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[EncodedExample], seed: int
    ) -> PeftModel:
        """Trainable adapters around `model`, which may be changed in place. `examples` is the fine-tuning data."""
        ...

    def save(self, model: PeftModel, folder: Path) -> dict[str, Any]:
        """Write the trained adapters so that they load on the original model; returns a report of plain values."""
        ...


@dataclass(frozen=True)
class PlainLora:
    """LoRA as it is: B = 0 and a random A, W + alpha / rank * B A."""

    settings: LoraSettings = field(default_factory=LoraSettings)
    name: str = "lora"

    def identity(self) -> dict[str, Any]:
        """The settings."""
        return {"method": self.name, **asdict(self.settings)}

    def attach(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[EncodedExample], seed: int
    ) -> PeftModel:
        """See `attach_lora`."""
        return attach_lora(model, self.settings, seed)

    def save(self, model: PeftModel, folder: Path) -> dict[str, Any]:
        """Write the adapter folder."""
        model.save_pretrained(str(folder))
        return {}


def attach_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """Adapters around `model`, the only trainable parameters; the same for the same seed.

    Raises:
        ValueError: none of `target_modules` is a module of the model, or the model has no linear layers.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules or default_targets(model)),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted linear layers with their names in the model underneath."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def factors(layer: LoraLinear) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A (rank, in) and B (out, rank) of an adapted layer."""
    a_RI, b_OR = (factor.get_submodule(ADAPTER).get_parameter("weight") for factor in (layer.lora_A, layer.lora_B))
    return a_RI, b_OR


def weight_under(layer: LoraLinear) -> torch.Tensor:
    """The (out, in) weight that the adapter sits on."""
    weight = layer.get_base_layer().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def merged_model(model_path: str, adapter: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with an adapter folder merged into its weights: trainable, in evaluation mode.

    Raises:
        FileNotFoundError: `adapter` holds no adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter_config.json; give a folder that peft has written")
    merged = load_adapter(load_model(model_path, dtype), str(adapter)).merge_and_unload()
    merged.requires_grad_(True)  # peft froze the weights it wrapped
    return merged.eval()

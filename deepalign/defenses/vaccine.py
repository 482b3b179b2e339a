"""Vaccine (Huang, Hu, Liu 2024): alignment under a perturbation of hidden states, so that it survives fine-tuning.

Each step takes two passes. The first finds g_l, the gradient of the loss with respect to the output of attention module
l. The second adds to each output

    e_l = rho * g_l / ||g||,    ||g|| = sqrt(sum over all modules of ||g_l||^2)

and its gradient with respect to the parameters is the step's. The norm runs over all modules, tokens and rows of the
micro-batch, as in the authors' code; e_l carries no gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from deepalign.data.chat import examples_digest
from deepalign.data.files import Message
from deepalign.data.steps import Batch
from deepalign.defenses.artifacts import make_once, model_identity
from deepalign.defenses.lora import LoraSettings, attach_lora
from deepalign.defenses.training import AnswerTrainer, SftSettings, encode_conversations, train_on_answers
from deepalign.kernels.checks import require
from deepalign.models import check_model_path, load_model, load_tokenizer

SMALLEST_NORM = 1e-7  # of the authors' code: no division by zero where the loss is flat


@dataclass(frozen=True)
class VaccineSettings:
    """The authors' settings: rho 2, LoRA rank 8 and alpha 4, 50 epochs in batches of 5.

    Attributes:
        rho: norm of the perturbation, over all attention outputs of a micro-batch together.
        lora: the alignment trains adapters, merged at the end.
        sft: schedule.

    Raises:
        ValueError: rho is negative.
    """

    rho: float = 2.0
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(rank=8, alpha=4, dropout=0.1))
    sft: SftSettings = field(
        default_factory=lambda: SftSettings(
            learning_rate=1e-3, epochs=50, batch_size=5, weight_decay=0.1, warmup_ratio=0.1
        )
    )

    def __post_init__(self) -> None:
        require(0 <= self.rho < float("inf"), "rho", self.rho, "at least 0 and finite")


def align_with_vaccine(
    model_path: str,
    conversations: Sequence[Sequence[Message]],
    out_dir: str | Path,
    settings: VaccineSettings | None = None,
    *,
    progress: bool = True,
) -> Path:
    """Train a model on alignment data (refusals of harmful requests) under the perturbation; returns its folder.

    Args:
        model_path: the model to align: a folder or a hub id.
        conversations: prompts with the answers to learn.
        out_dir: the folder of the new model; made once, see `artifacts.make_once`.
        settings: None: the authors'.
        progress: show a bar.

    Raises:
        FileNotFoundError, ValueError: no such model, no conversations, a folder made from other things.
    """
    settings = settings or VaccineSettings()
    check_model_path("model_path", model_path)
    tokenizer, model = load_tokenizer(model_path), load_model(model_path, torch.float32)
    examples = encode_conversations(conversations, tokenizer, model, settings.sft.max_length)
    identity = {"vaccine": asdict(settings), "model": model_identity(model_path), "data": examples_digest(examples)}

    def make(folder: Path, work: Path) -> dict[str, Any]:
        adapted = attach_lora(model, settings.lora, settings.sft.seed)
        trained = train_on_answers(
            adapted,
            tokenizer,
            examples,
            settings.sft,
            work,
            trainer_class=VaccineTrainer,
            rho=settings.rho,
            progress=progress,
        )
        adapted.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return trained

    make_once(Path(out_dir), identity, make, progress=progress)
    return Path(out_dir)


class VaccineTrainer(AnswerTrainer):
    """`AnswerTrainer` whose loss is that of the second, perturbed pass."""

    def __init__(self, *, rho: float, **options: Any) -> None:
        super().__init__(**options)
        self.rho = rho

    def training_step(
        self, model: Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> Tensor:
        """Two passes; the perturbation stays on through the backward, which may run layers again (checkpointing)."""
        model.train()
        batch = {name: tensor.to(self.args.device) for name, tensor in inputs.items()}

        def first_loss() -> Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, batch)

        perturbation = attention_perturbation(model, first_loss, self.rho)
        with perturbed_attention(perturbation):
            return super().training_step(model, inputs, num_items_in_batch)


def attention_perturbation(model: Module, loss: Callable[[], Tensor], rho: float) -> dict[Module, Tensor]:
    """The perturbation of each attention module's output, of norm `rho` over all of them together.

    Args:
        model: any causal language model of transformers, or a PEFT model around one.
        loss: runs the model and returns the scalar loss.
        rho: at least 0.

    Returns:
        Attention module -> tensor of its output's shape. No gradient of a parameter is touched.

    Raises:
        ValueError: the model has no attention modules.
    """
    modules = attention_modules(model)
    zeros: dict[Module, Tensor] = {}

    def add_zero(module: Module, arguments: Any, output: Any) -> Any:
        # a leaf of its own: the gradient exists even where no parameter before it trains
        zeros.setdefault(module, torch.zeros_like(output[0], requires_grad=True))
        return (output[0] + zeros[module], *output[1:])

    with _forward_hooks(modules, add_zero):
        gradients = torch.autograd.grad(loss(), [zeros[module] for module in modules])
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]))
    scale = rho / (norm + SMALLEST_NORM)
    return {module: g * scale.to(g.dtype) for module, g in zip(modules, gradients, strict=True)}


@contextmanager
def perturbed_attention(perturbation: dict[Module, Tensor]) -> Iterator[None]:
    """Add the perturbation to the attention outputs while the block runs."""

    def add(module: Module, arguments: Any, output: Any) -> Any:
        return (output[0] + perturbation[module], *output[1:])

    with _forward_hooks(list(perturbation), add):
        yield


def attention_modules(model: Module) -> list[Module]:
    """The self-attention module of each decoder layer.

    Raises:
        ValueError: there is none (transformers names them `self_attn`).
    """
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "self_attn"]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no module named self_attn, which is what Vaccine perturbs; use a decoder "
            "model of the Llama or Qwen families"
        )
    return modules


@contextmanager
def _forward_hooks(modules: Sequence[Module], hook: Callable[[Module, Any, Any], Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

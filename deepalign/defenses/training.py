"""Training on answers: the cross entropy of answer tokens, by a transformers.Trainer. The baselines and the
fine-tuning attack share it.

Steps come from `StepDataset`, so which rows meet in step s depends on (seed, s) alone, and weights are divided over the
whole step beforehand: nothing divides the loss again. Of its two streams the first is what is learnt; the second, the
anchor, may be empty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deepalign.data.chat import EncodedExample, encode_example
from deepalign.data.files import Message
from deepalign.data.steps import Batch, RowWeights, StepDataset
from deepalign.kernels.checks import require
from deepalign.models import longest_example


@dataclass(frozen=True)
class SftSettings:
    """How to train on answers. Batch sizes are rows per optimizer step, over all accumulated micro-batches.

    Attributes:
        learning_rate: AdamW's peak.
        epochs: passes over the rows; the number of steps is rounded up, and the last step is filled from the next pass.
        batch_size: rows per step.
        gradient_accumulation_steps: micro-batches per step; must divide `batch_size`.
        max_steps: optimizer steps; overrides `epochs`.
        lr_scheduler_type, weight_decay, max_grad_norm: as for `transformers.TrainingArguments`.
        warmup_ratio: share of the steps in which the rate rises linearly.
        max_length: tokens; longer rows lose the end of their answer. None: the model's context.
        seed: order of the rows, initialisation of adapters, dropout.
        bf16, gradient_checkpointing: None: on a GPU.
        save_steps: an interrupted training goes on from its last multiple of this.

    Raises:
        ValueError: a value out of its range.
    """

    learning_rate: float = 2e-4
    epochs: float = 1.0
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int | None = None
    seed: int = 42
    bf16: bool | None = None
    gradient_checkpointing: bool | None = None
    save_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "max_grad_norm"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "positive and finite")
        for name in ("batch_size", "gradient_accumulation_steps", "save_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("max_steps", "max_length"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("weight_decay", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "in [0, 1)")

    def steps(self, rows: int, batch_size: int | None = None) -> int:
        """Optimizer steps for so many rows."""
        return self.max_steps or max(1, math.ceil(self.epochs * rows / (batch_size or self.batch_size)))


class AnswerTrainer(Trainer):
    """Cross entropy of the answer tokens of `StepDataset` batches.

    Args:
        anchor_mix: None: the mean over all answer tokens of a step, both streams pooled. A share a in [0, 1]:
            a * (mean over the first stream) + (1 - a) * (mean over the anchor).
    """

    def __init__(self, *, anchor_mix: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.anchor_mix = anchor_mix
        # either prints a line per step
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        if not self.args.disable_tqdm:
            self.add_callback(LossBar())

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """The micro-batches in order; `StepDataset` has already shuffled."""
        assert isinstance(self.train_dataset, StepDataset)
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch. The loss is already divided over the whole step."""
        model.train()
        batch = {name: tensor.to(self.args.device) for name, tensor in inputs.items()}
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's loss."""
        loss_R = answer_token_losses(model, inputs)
        if self.anchor_mix is None:
            return (inputs["kl_weight"] * loss_R).sum()
        mixed_R = self.anchor_mix * inputs["kl_weight"] + (1 - self.anchor_mix) * inputs["completion_weight"]
        return (mixed_R * loss_R).sum()


class LossBar(ProgressCallback):
    """The Trainer's bar, with the loss at its end instead of a line per step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the last loss."""
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def answer_token_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """(R,) fp32 cross entropy of the tokens after the batch's R rows."""
    input_ids_BT, row_index_R = batch["input_ids"], batch["row_index"]
    logits_BTV = model(input_ids=input_ids_BT, attention_mask=batch["attention_mask"], use_cache=False).logits
    logits_RV = logits_BTV.flatten(0, 1)[row_index_R].float()
    return functional.cross_entropy(logits_RV, input_ids_BT.flatten()[row_index_R + 1], reduction="none")


def train_on_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    settings: SftSettings,
    work_dir: Path,
    *,
    anchor: Sequence[EncodedExample] = (),
    anchor_batch_size: int = 0,
    anchor_mix: float | None = None,
    trainer_class: type[AnswerTrainer] = AnswerTrainer,
    progress: bool = True,
    **trainer_options: Any,
) -> dict[str, Any]:
    """Train `model` in place; an interrupted training goes on from its last checkpoint in `work_dir`.

    Args:
        model: a causal language model, or a PEFT model around one.
        tokenizer: supplies the padding id.
        examples: what is learnt; `settings.batch_size` of them a step.
        settings: schedule and seed.
        work_dir: for checkpoints.
        anchor, anchor_batch_size, anchor_mix: a second stream, and how the two are weighed; see `AnswerTrainer`.
        trainer_class, trainer_options: a trainer that takes more.
        progress: show a bar.

    Returns:
        "steps", and "losses", the training loss of each step.

    Raises:
        ValueError: no examples, or batch sizes that do not divide into micro-batches.
    """
    pooled = anchor_mix is None
    dataset = StepDataset(
        examples,
        anchor,
        harmful_batch_size=settings.batch_size,
        utility_batch_size=anchor_batch_size,
        max_steps=settings.steps(len(examples)),
        # `kl` weighs the first stream; the anchor shares it where both are pooled, else it has `completion` for itself
        weights=RowWeights(1.0, 0.0, utility_kl=float(pooled), utility_completion=float(not pooled)),
        pad_token_id=int(tokenizer.pad_token_id),
        seed=settings.seed,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
    )
    on_gpu = torch.cuda.is_available()
    if settings.gradient_checkpointing or (settings.gradient_checkpointing is None and on_gpu):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    args = _training_arguments(settings, dataset, work_dir, progress)
    trainer = trainer_class(model=model, args=args, train_dataset=dataset, anchor_mix=anchor_mix, **trainer_options)
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(work_dir))
    model.eval()
    history = trainer.state.log_history
    return {"steps": trainer.state.global_step, "losses": [entry["loss"] for entry in history if "loss" in entry]}


def _last_whole_checkpoint(work_dir: Path) -> str | None:
    """The Trainer writes its state last: a checkpoint without it was cut off."""
    whole = [path.parent for path in work_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[-1]))) if whole else None


def _training_arguments(
    settings: SftSettings, dataset: StepDataset, work_dir: Path, progress: bool
) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(work_dir),
        max_steps=dataset.max_steps,
        per_device_train_batch_size=max(1, sum(dataset.batch_sizes) // settings.gradient_accumulation_steps),
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=round(settings.warmup_ratio * dataset.max_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        seed=settings.seed,
        bf16=on_gpu if settings.bf16 is None else settings.bf16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=not progress,
    )


@torch.no_grad()
def mean_answer_loss(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    batch_size: int = 32,
) -> float:
    """Mean cross entropy (nats) over all answer tokens of `examples`, the end of turn included.

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("there is nothing to evaluate: the list of examples is empty")
    total = tokens = 0.0
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))  # padded together by length
    device = next(model.parameters()).device
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        batch = StepDataset(
            part,
            [],
            harmful_batch_size=len(part),
            utility_batch_size=0,
            max_steps=1,
            weights=RowWeights(1.0, 0.0, 0.0, 0.0),
            pad_token_id=int(tokenizer.pad_token_id),
            seed=0,
        )[0]
        loss_R = answer_token_losses(model, {name: tensor.to(device) for name, tensor in batch.items()})
        total += float(loss_R.double().sum())
        tokens += loss_R.numel()
    return total / tokens


def encode_conversations(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    max_length: int | None,
) -> list[EncodedExample]:
    """Conversations as token ids, cut to `max_length` and the model's context; an error names the row.

    Raises:
        ValueError: no rows, or one whose prompt alone fills the length.
    """
    if not conversations:
        raise ValueError("there are no conversations to train on; give at least one")
    length = longest_example(max_length, model)
    examples = []
    for row, messages in enumerate(conversations, start=1):
        try:
            examples.append(encode_example(tokenizer, list(messages), length))
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from None
    return examples

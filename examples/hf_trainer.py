"""The completion loss in `transformers.Trainer`: override `compute_loss`: `python examples/hf_trainer.py`.

deepalign's own trainer (docs/training.md) also does ZeRO-3, two data streams, exact denominators over ranks and
accumulation, and cached teachers. This is for a trainer that you already have, on one device or under DDP: there each
micro-batch divides by its own weights, and the Trainer takes the mean over micro-batches and ranks.
"""

import tempfile
from typing import Any

import torch
from tiny import batch, student_aligned_base
from transformers import PreTrainedModel, Trainer, TrainingArguments

from deepalign import CompletionLossConfig, fused_completion_loss
from deepalign.data import response_mask_to_row_weights


class CompletionLossTrainer(Trainer):
    """Batches hold input_ids, attention_mask, response_mask (B, T) and harmful (B,)."""

    def __init__(self, *, aligned: PreTrainedModel, base: PreTrainedModel, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean already: the Trainer divides by the accumulation
        self.aligned, self.base = aligned.to(self.args.device), base.to(self.args.device)
        self.loss_config = CompletionLossConfig(top_k=10, lambda_reg=1e-2)

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **_: Any) -> Any:
        harmful = inputs.pop("harmful")
        rows = response_mask_to_row_weights(inputs.pop("response_mask"), kl=1.0, completion=harmful.float())
        with torch.no_grad():
            aligned, base = (frozen(**inputs).logits for frozen in (self.aligned, self.base))
        outputs = model(**inputs)
        logits = (tensor.flatten(0, 1)[rows.row_index] for tensor in (outputs.logits, aligned, base))
        loss = fused_completion_loss(
            *logits,
            kl_weight=rows.kl_weight,
            completion_weight=rows.completion_weight,
            config=self.loss_config,
            reduction="sum",
        ).loss
        return (loss, outputs) if return_outputs else loss


input_ids, attention_mask, response_mask, harmful = batch()
names = ("input_ids", "attention_mask", "response_mask", "harmful")
dataset = [
    dict(zip(names, row, strict=True)) for row in zip(input_ids, attention_mask, response_mask, harmful, strict=True)
]
student, aligned, base = student_aligned_base()
trainer = CompletionLossTrainer(
    model=student,
    aligned=aligned,
    base=base,
    train_dataset=dataset,
    args=TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        max_steps=30,
        learning_rate=2e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,  # response_mask and harmful are not the model's
    ),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")

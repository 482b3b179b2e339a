"""The completion loss in TRL's SFTTrainer: `pip install trl`, then `python examples/trl_sft.py`.

TRL tokenises prompt and completion and masks the prompt (`labels` -100); the column that says which rows are harmful
goes around its collator. Each micro-batch divides by its own weights, and the trainer takes the mean over them.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tiny import CONVERSATIONS, student_aligned_base, tokenizer
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from deepalign import CompletionLossConfig, fused_completion_loss
from deepalign.data import response_mask_to_row_weights


class Collator(DataCollatorForLanguageModeling):
    """TRL's collator, and the harmful column."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call(examples) | {"harmful": torch.tensor([example["harmful"] for example in examples])}


class CompletionSFTTrainer(SFTTrainer):
    """SFTTrainer with the completion loss against two frozen models."""

    def __init__(self, *, aligned: PreTrainedModel, base: PreTrainedModel, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean already: the trainer divides by the accumulation
        self.aligned, self.base = aligned.to(self.args.device), base.to(self.args.device)

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **_: Any) -> Any:
        harmful = inputs.pop("harmful")
        rows = response_mask_to_row_weights(inputs.pop("labels") != -100, kl=1.0, completion=harmful.float())
        with torch.no_grad():
            aligned, base = (frozen(**inputs).logits for frozen in (self.aligned, self.base))
        outputs = model(**inputs)
        logits = (tensor.flatten(0, 1)[rows.row_index] for tensor in (outputs.logits, aligned, base))
        loss = fused_completion_loss(
            *logits,
            kl_weight=rows.kl_weight,
            completion_weight=rows.completion_weight,
            config=CompletionLossConfig(top_k=10, lambda_reg=1e-2),
            reduction="sum",
        ).loss
        return (loss, outputs) if return_outputs else loss


dataset = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": answer}],
            "harmful": harmful,
        }
        for prompt, answer, harmful in CONVERSATIONS
    ]
)
student, aligned, base = student_aligned_base()
tok = tokenizer()
trainer = CompletionSFTTrainer(
    model=student,
    aligned=aligned,
    base=base,
    train_dataset=dataset,
    processing_class=tok,
    data_collator=Collator(pad_token_id=tok.pad_token_id),
    args=SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        max_steps=30,
        learning_rate=2e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
    ),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")

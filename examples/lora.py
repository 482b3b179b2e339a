"""A LoRA student, whose own weights with the adapter switched off are the aligned model: `python examples/lora.py`.

Two models in memory instead of three: the student starts as the aligned model, so its frozen weights are that model.
"""

import torch
from peft import LoraConfig, get_peft_model
from tiny import batch, student_aligned_base

from deepalign import CompletionLossConfig, fused_linear_completion_loss
from deepalign.data import response_mask_to_row_weights
from deepalign.output_head import hidden_states, output_head

_, aligned, base = student_aligned_base()
student = get_peft_model(aligned, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
student.print_trainable_parameters()
optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
head = output_head(student).lm_head  # "all-linear" leaves the head alone: frozen, and the aligned model's too


def hidden_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor], row_index: torch.Tensor) -> torch.Tensor:
    """Hidden states of the rows that carry a weight, (R, H)."""
    return hidden_states(model, **inputs).flatten(0, 1)[row_index]


for step in range(30):
    input_ids, attention_mask, response_mask, harmful = batch()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    rows = response_mask_to_row_weights(response_mask, kl=1.0, completion=harmful.float())
    with torch.no_grad():
        with student.disable_adapter():
            aligned_hidden = hidden_of(student, inputs, rows.row_index)
        base_hidden = hidden_of(base, inputs, rows.row_index)
    output = fused_linear_completion_loss(
        hidden_of(student, inputs, rows.row_index),
        head,
        aligned_hidden,
        head,
        base_hidden,
        output_head(base).lm_head,
        kl_weight=rows.kl_weight,
        completion_weight=rows.completion_weight,
        config=CompletionLossConfig(top_k=10, lambda_reg=1e-2),
        reduction="sum",
    )
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {output.loss.item():.4f}")

"""The completion loss in a plain training loop: `python examples/plain_loop.py`.

Harmful answers carry the penalty, all answers the distillation (the paper's is on the others alone: docs/microworld.md
has what came of that). The frozen models run without gradients; the loss reads
the logits of the rows that predict an answer token, and nothing of the prompts and the padding.
"""

import torch
from tiny import batch, student_aligned_base

from deepalign import CompletionLossConfig, fused_completion_loss
from deepalign.data import response_mask_to_row_weights

student, aligned, base = student_aligned_base()
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
config = CompletionLossConfig(top_k=10, lambda_reg=1e-2)


def logits_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor], row_index: torch.Tensor) -> torch.Tensor:
    """Logits of the rows that carry a weight, (R, V)."""
    return model(**inputs).logits.flatten(0, 1)[row_index]


for step in range(30):
    input_ids, attention_mask, response_mask, harmful = batch()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    rows = response_mask_to_row_weights(response_mask, kl=1.0, completion=harmful.float())
    with torch.no_grad():
        aligned_logits, base_logits = (logits_of(frozen, inputs, rows.row_index) for frozen in (aligned, base))
    output = fused_completion_loss(
        logits_of(student, inputs, rows.row_index),
        aligned_logits,
        base_logits,
        kl_weight=rows.kl_weight,
        completion_weight=rows.completion_weight,
        config=config,
        reduction="sum",  # the weights are divided already
    )
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {output.loss.item():.4f}, base-favored {output.base_favored_count.float().mean():.1f}")

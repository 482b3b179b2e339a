"""The completion loss in a plain training loop: `python examples/plain_loop.py`.

Harmful answers carry the penalty, the others the distillation. The frozen models run without gradients; the loss reads
the logits of the rows that predict an answer token, and nothing of the prompts and the padding.
"""

import torch
from tiny import batch, student_aligned_base

from deepalign import CompletionLossConfig, fused_completion_loss
from deepalign.data import response_mask_to_row_weights

student, aligned, base = student_aligned_base()
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
config = CompletionLossConfig(top_k=10, lambda_reg=1e-2)

for step in range(10):
    input_ids, attention_mask, response_mask, harmful = batch()
    rows = response_mask_to_row_weights(response_mask, kl=(~harmful).float(), completion=harmful.float())

    def logits_of(model: torch.nn.Module) -> torch.Tensor:
        logits_BTV = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits_BTV.flatten(0, 1)[rows.row_index]

    with torch.no_grad():
        aligned_logits, base_logits = logits_of(aligned), logits_of(base)
    output = fused_completion_loss(
        logits_of(student),
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

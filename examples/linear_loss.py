"""The loss without logits: hidden states and heads in, no (rows, vocabulary) tensor: `python examples/linear_loss.py`.

The same training as plain_loop.py. At a vocabulary of 128k entries the logits of three models and their temporaries are
what fills a GPU first; here no more than a chunk of rows exists at a time.
"""

import torch
from tiny import batch, student_aligned_base

from deepalign import CompletionLossConfig, fused_linear_completion_loss
from deepalign.data import response_mask_to_row_weights
from deepalign.output_head import check_output_head, hidden_states, output_head

student, aligned, base = student_aligned_base()
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
for model in (aligned, base):
    check_output_head(model)  # refuses a family that does something unknown to its logits


def hidden_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor], row_index: torch.Tensor) -> torch.Tensor:
    """Hidden states of the rows that carry a weight, (R, H)."""
    return hidden_states(model, **inputs).flatten(0, 1)[row_index]


for step in range(30):
    input_ids, attention_mask, response_mask, harmful = batch()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    rows = response_mask_to_row_weights(response_mask, kl=1.0, completion=harmful.float())
    with torch.no_grad():
        aligned_hidden, base_hidden = (hidden_of(frozen, inputs, rows.row_index) for frozen in (aligned, base))
    output = fused_linear_completion_loss(
        hidden_of(student, inputs, rows.row_index),
        output_head(student).lm_head,
        aligned_hidden,
        output_head(aligned).lm_head,
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
    print(f"step {step}: loss {output.loss.item():.4f}, base-favored {output.base_favored_count.float().mean():.1f}")

"""What the training really sees: a micro-batch decoded, every token with the weights of the row that predicts it.

    python -m deepalign.train.run --config X.yaml --show_example 2

Chat templates differ in ways that no error reports (a second <bos>, an answer without its end-of-turn token, an empty
<think> block that counts as the answer), so look once before a long run.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deepalign.data.steps import Batch


def show_batch(tokenizer: "PreTrainedTokenizerBase", batch: "Batch", examples: int | None = None) -> str:
    """A `StepDataset` item as text: prompts as they are decoded, then one line per token that carries a weight.

    Args:
        tokenizer: the one that encoded the batch.
        batch: an item of `StepDataset`, padded or packed.
        examples: how many examples to show (None: all).

    Weights are shown as they are in the batch: divided by their sum over the step, times the number of ranks.
    """
    width = batch["input_ids"].shape[1]
    kl, completion = (_per_token(batch, name) for name in ("kl_weight", "completion_weight"))
    blocks = []
    for number, (first, last) in enumerate(example_spans(batch)[:examples], start=1):
        ids = batch["input_ids"].flatten()[first:last].tolist()
        weighted = [i for i in range(first, last) if kl[i] > 0 or completion[i] > 0]
        start = weighted[0] - first if weighted else len(ids)
        title = f"example {number} (row {first // width}, tokens {first % width}..{first % width + len(ids) - 1})"
        rows = [
            f"  {batch['input_ids'].flatten()[i]:>8}  kl {kl[i]:.3e}  completion {completion[i]:.3e}  "
            f"{_decoded(tokenizer, [int(batch['input_ids'].flatten()[i])])!r}"
            for i in range(first + start, last)
        ]
        head = f"prompt, no weight: {_decoded(tokenizer, ids[:start])!r}"
        blocks.append(
            "\n".join([title, head, f"answer, {len(rows)} tokens:" if rows else "no token has a weight", *rows])
        )
    return "\n\n".join(blocks)


def example_spans(batch: "Batch") -> list[tuple[int, int]]:
    """First and last + 1 place of every example in the flattened (B*T,) tokens, padding left out."""
    if "position_ids" in batch:
        starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
        return list(zip(starts, [*starts[1:], batch["position_ids"].numel()], strict=True))
    width = batch["input_ids"].shape[1]
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return [(row * width, row * width + int(length)) for row, length in enumerate(lengths)]


def _per_token(batch: "Batch", name: str) -> torch.Tensor:
    """(B*T,) weights at the predicted tokens: a row's weight belongs to the token after it."""
    weights = torch.zeros(batch["input_ids"].numel())
    weights[batch["row_index"] + 1] = batch[name]
    return weights


def _decoded(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # one sequence in, one text out
    return text

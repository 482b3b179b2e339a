"""Packing without cross-contamination: losses and gradients of packed examples are those of the padded ones."""

import pytest
import torch

from deepalign import CompletionLossConfig, fused_completion_loss
from deepalign.data.chat import EncodedExample
from deepalign.data.steps import RandomSelection, RowWeights, StepDataset
from tests.families import FAMILIES

# Gemma 2: eager attention only; a sliding window in every other layer, shorter than the longest example (15) and longer
# than the padding (9): a padding token that sees padding alone is NaN in float64, and poisons the padded comparison
CASES = [(name, attention) for name in ("llama31_8b", "qwen25_7b", "qwen3_8b") for attention in ("eager", "sdpa")]
CASES.append(("gemma2", "eager"))
WINDOW = 10


def examples(count: int, vocab_size: int) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(count)
    rows = [torch.randint(3, vocab_size, (6 + 3 * i,), generator=generator).tolist() for i in range(count)]
    return [EncodedExample(row, 2 + i, False) for i, row in enumerate(rows)]


def dataset(vocab_size: int, **options: object) -> StepDataset:
    return StepDataset(
        examples(4, vocab_size),
        examples(3, vocab_size),
        harmful_batch_size=4,
        utility_batch_size=2,
        max_steps=2,
        weights=RowWeights.from_options("both", 1.0, 0.25),
        pad_token_id=0,
        seed=0,
        **options,
    )


def loss_and_gradients(model, batch):
    forward = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    logits_NV = model(**forward, use_cache=False).logits.flatten(0, 1)[batch["row_index"]]
    generator = torch.Generator().manual_seed(0)
    teachers = torch.randn(2, *logits_NV.shape, generator=generator, dtype=logits_NV.dtype)
    output = fused_completion_loss(
        logits_NV,
        *teachers,
        kl_weight=batch["kl_weight"],
        completion_weight=batch["completion_weight"],
        config=CompletionLossConfig(top_k=5, lambda_reg=0.05),
        reduction="sum",
        implementation="reference",
    )
    model.zero_grad()
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_packed_losses_and_gradients_equal_unpacked_ones(name, attention):
    model = FAMILIES[name].model(**({"sliding_window": WINDOW} if name == "gemma2" else {})).double().eval()
    model.set_attn_implementation(attention)
    vocab_size = model.config.vocab_size
    padded, packed = dataset(vocab_size), dataset(vocab_size, packing=True)
    for step in range(2):
        assert packed[step]["input_ids"].shape[0] == 1
        assert packed[step]["input_ids"].numel() == int(padded[step]["attention_mask"].sum())
        expected_loss, expected = loss_and_gradients(model, padded[step])
        loss, gradients = loss_and_gradients(model, packed[step])
        # rotary embeddings, norms and eager attention's softmax round to fp32 whatever the model's dtype
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
        for parameter, gradient in gradients.items():
            scale = float(expected[parameter].abs().max())
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-6 * scale, msg=parameter)


def test_the_comparison_would_notice_an_example_that_attends_to_another():
    model = FAMILIES["llama31_8b"].model().double().eval()
    batch = dataset(model.config.vocab_size, packing=True)[0]
    loss, _ = loss_and_gradients(model, batch)
    crossing = batch | {"position_ids": torch.arange(batch["input_ids"].numel())[None]}
    crossed, _ = loss_and_gradients(model, crossing)
    assert abs(crossed - loss) > 1e-3 * loss


def test_random_selections_and_weights_are_those_of_the_padded_rows():
    selection = RandomSelection(top_k=4, vocab_size=50)
    padded, packed = (dataset(50, random_selection=selection, packing=packing)[1] for packing in (False, True))
    for name in ("kl_weight", "completion_weight", "top_k_indices"):
        assert torch.equal(padded[name], packed[name])
    tokens = [batch["input_ids"].flatten()[batch["row_index"] + 1] for batch in (padded, packed)]
    assert torch.equal(*tokens)
    assert "attention_mask" not in packed
    assert "position_ids" not in padded


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama31_8b", "qwen3_8b"])
def test_packed_equals_unpacked_in_bf16_on_a_gpu(name):
    """With flash attention where its package is installed, else with sdpa, to bf16's precision."""
    from transformers.utils import is_flash_attn_2_available

    model = FAMILIES[name].model(head_dim=32).to("cuda", torch.bfloat16).eval()
    if is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")
    vocab_size = model.config.vocab_size
    rows = []
    for packing in (False, True):
        batch = {name: tensor.cuda() for name, tensor in dataset(vocab_size, packing=packing)[0].items()}
        forward = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        with torch.no_grad():
            rows.append(model(**forward, use_cache=False).logits.flatten(0, 1)[batch["row_index"]].float())
    assert (rows[0] - rows[1]).abs().max() < 0.05 * rows[0].abs().max()

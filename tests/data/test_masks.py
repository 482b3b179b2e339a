import pytest
import torch

from deepalign.data import response_mask_to_row_weights, weight_sums
from deepalign.data.chat import EncodedExample
from deepalign.data.steps import RowWeights, StepDataset, pack, pad

EXAMPLES = [EncodedExample(list(range(100 * i, 100 * i + 5 + i)), 2 + i % 2, False) for i in range(8)]
WEIGHTS = RowWeights(harmful_kl=1.0, harmful_completion=2.0, utility_kl=0.5, utility_completion=0.0)


def test_a_row_is_the_position_before_the_token_it_predicts():
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    selected = response_mask_to_row_weights(mask)
    assert selected.row_index.tolist() == [1, 2, 5, 6, 7, 8]
    assert selected.kl_weight.tolist() == selected.completion_weight.tolist() == pytest.approx([1 / 6] * 6)
    assert selected.kl_weight.dtype == torch.float32


def test_streams_and_denominators():
    mask = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 1]])
    kl, completion = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    selected = response_mask_to_row_weights(mask, kl=kl, completion=completion)
    assert selected.row_index.tolist() == [0, 1, 4]
    assert selected.kl_weight.tolist() == [0, 0, 1]
    assert selected.completion_weight.tolist() == [0.5, 0.5, 0]
    assert weight_sums(mask, kl=kl, completion=completion) == (1.0, 2.0)
    whole = response_mask_to_row_weights(mask, kl=kl, completion_denominator=8.0, world_size=4)
    assert whole.completion_weight.tolist() == [0.5] * 5
    nothing = response_mask_to_row_weights(mask, kl=0.0, completion=completion)
    assert nothing.kl_weight.tolist() == [0, 0]
    empty = response_mask_to_row_weights(mask, kl=0.0, completion=0.0)
    assert empty.row_index.numel() == empty.kl_weight.numel() == 0


@pytest.mark.parametrize("packing", [False, True])
def test_it_yields_what_step_dataset_yields(packing):
    """A trainer of one's own: masks per micro-batch, denominators summed over two ranks with two micro-batches each."""
    options = {"harmful_batch_size": 4, "utility_batch_size": 4, "max_steps": 3, "pad_token_id": 0, "seed": 1}
    ranks = [
        StepDataset(
            EXAMPLES[:5],
            EXAMPLES[5:],
            weights=WEIGHTS,
            gradient_accumulation_steps=2,
            rank=rank,
            world_size=2,
            packing=packing,
            **options,
        )
        for rank in (0, 1)
    ]
    for step in range(3):
        parts = []
        for dataset in ranks:
            for micro_batch in (0, 1):
                batch = dataset[2 * step + micro_batch]
                # the examples are recognised by their tokens
                order = [EXAMPLES[token // 100] for token in batch["input_ids"].flatten().tolist() if token % 100 == 0]
                order = order if packing else [EXAMPLES[row[0] // 100] for row in batch["input_ids"].tolist()]
                harmful = torch.tensor([example in EXAMPLES[:5] for example in order]).double()
                kl, completion = harmful + 0.5 * (1 - harmful), 2 * harmful
                _, mask = pack(order) if packing else pad(order, 0)
                if packing:
                    lengths = torch.tensor([len(example.input_ids) for example in order])
                    kl, completion = (weight.repeat_interleave(lengths)[None] for weight in (kl, completion))
                parts.append((batch, mask, kl, completion))
        sums = [weight_sums(mask, kl=kl, completion=completion) for _, mask, kl, completion in parts]
        kl_denominator, completion_denominator = (sum(column) for column in zip(*sums, strict=True))
        for batch, mask, kl, completion in parts:
            selected = response_mask_to_row_weights(
                mask,
                kl=kl,
                completion=completion,
                kl_denominator=kl_denominator,
                completion_denominator=completion_denominator,
                world_size=2,
            )
            for name, tensor in selected._asdict().items():
                assert torch.equal(tensor, batch[name]), name


@pytest.mark.parametrize(
    ("mask", "options", "problem"),
    [
        (torch.tensor([1, 0]), {}, r"shape \(2,\); expected \(sequences, tokens\)"),
        (torch.tensor([[0, 2]]), {}, "values other than 0 and 1"),
        (torch.tensor([[0.0, 0.5]]), {}, "values other than 0 and 1"),
        (torch.tensor([[1, 1]]), {}, "marks the first token"),
        (torch.tensor([[0, 1]]), {"kl": torch.ones(3)}, r"kl has shape \(3,\); expected a number, \(1,\) or \(1, 2\)"),
        (torch.tensor([[0, 1]]), {"completion": -1.0}, "completion holds negative weights"),
        (torch.tensor([[0, 1]]), {"kl": float("nan")}, "kl holds negative weights, infinities or NaN"),
    ],
)
def test_bad_masks_and_weights_are_refused(mask, options, problem):
    with pytest.raises(ValueError, match=problem):
        response_mask_to_row_weights(mask, **options)

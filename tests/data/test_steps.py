from collections import Counter

import pytest
import torch

from deepalign.data.chat import EncodedExample
from deepalign.data.steps import HARMFUL, UTILITY, RandomSelection, RowWeights, StepDataset

PAD = 0
# every example is recognisable by its tokens; lengths differ
HARMFUL_ROWS = [EncodedExample([100 + i] * (5 + i % 3), 2, False) for i in range(7)]
UTILITY_ROWS = [EncodedExample([200 + i] * (4 + i % 4), 3, False) for i in range(10)]


def dataset(**changes):
    options = {
        "harmful_batch_size": 4,
        "utility_batch_size": 8,
        "max_steps": 6,
        "weights": RowWeights.from_options("both"),
        "pad_token_id": PAD,
        "seed": 3,
    }
    return StepDataset(HARMFUL_ROWS, UTILITY_ROWS, **(options | changes))


def rows_seen(batch):
    return Counter(int(row[0]) for row in batch["input_ids"])


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_a_step_has_the_same_rows_however_it_is_divided(world_size, accumulation):
    whole = dataset()
    parts = [
        dataset(rank=rank, world_size=world_size, gradient_accumulation_steps=accumulation)
        for rank in range(world_size)
    ]
    for step in range(6):
        together = Counter()
        for part in parts:
            for micro_batch in range(accumulation):
                together += rows_seen(part[step * accumulation + micro_batch])
        assert together == rows_seen(whole[step])


@pytest.mark.parametrize("stream", [HARMFUL, UTILITY])
def test_every_pass_sees_every_row_once_in_a_new_order(stream):
    steps = dataset(max_steps=70)
    count = len(steps.streams[stream])
    order = [row for step in range(70) for row in steps.rows_of_step(stream, step)]
    passes = [order[i : i + count] for i in range(0, len(order) - count, count)]
    assert all(sorted(rows) == list(range(count)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) > 1


def test_the_order_depends_on_the_seed_alone():
    assert torch.equal(dataset()[3]["input_ids"], dataset()[3]["input_ids"])
    assert any(
        dataset().rows_of_step(HARMFUL, step) != dataset(seed=4).rows_of_step(HARMFUL, step) for step in range(3)
    )


def test_weights_sit_on_the_rows_that_predict_the_answer():
    batch = dataset(harmful_batch_size=1, utility_batch_size=0)[0]
    example = HARMFUL_ROWS[dataset(harmful_batch_size=1).rows_of_step(HARMFUL, 0)[0]]
    length = len(example.input_ids)
    assert batch["input_ids"].shape == (1, length)
    assert batch["row_index"].tolist() == list(range(example.response_start - 1, length - 1))


def test_padding_is_masked_and_carries_no_weight():
    batch = dataset()[0]
    width = batch["input_ids"].shape[1]
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == PAD)
    predicted = batch["row_index"] + 1
    assert (batch["attention_mask"].flatten()[predicted] == 1).all()
    assert (predicted % width != 0).all()


@pytest.mark.parametrize("distill_on", ["utility", "harmful", "both"])
def test_weights_add_up_to_the_number_of_ranks_over_a_step(distill_on):
    """Each term's weights, over all ranks and micro-batches, sum to world_size: the loss is the mean over the step."""
    weights = RowWeights.from_options(distill_on, completion_weight_harmful=2.0, completion_weight_utility=0.5)
    parts = [dataset(weights=weights, rank=rank, world_size=2, gradient_accumulation_steps=2) for rank in range(2)]
    for step in range(3):
        batches = [part[step * 2 + micro] for part in parts for micro in range(2)]
        for term in ("kl_weight", "completion_weight"):
            total = sum(float(batch[term].double().sum()) for batch in batches)
            assert total == pytest.approx(2.0, abs=1e-6)


def test_distill_on_and_completion_weights_choose_the_streams():
    weights = RowWeights.from_options("utility", completion_weight_harmful=3.0, completion_weight_utility=0.0)
    batch = dataset(weights=weights)[0]
    first_token = batch["input_ids"].gather(1, torch.zeros(12, 1, dtype=torch.int64)).flatten()
    harmful = first_token[batch["row_index"] // batch["input_ids"].shape[1]] < 200
    assert harmful.any()
    assert (~harmful).any()
    assert (batch["kl_weight"][harmful] == 0).all()
    assert (batch["kl_weight"][~harmful] > 0).all()
    assert (batch["completion_weight"][harmful] > 0).all()
    assert (batch["completion_weight"][~harmful] == 0).all()


def test_rows_without_any_weight_are_left_out():
    weights = RowWeights.from_options("harmful")
    batch = dataset(weights=weights)[0]
    width = batch["input_ids"].shape[1]
    assert set((batch["row_index"] // width).tolist()) == {0, 1, 2, 3}


def test_random_selections_are_distinct_and_the_same_however_divided():
    selection = RandomSelection(top_k=5, vocab_size=20)
    whole = dataset(random_selection=selection)[2]
    assert whole["top_k_indices"].shape == (whole["row_index"].numel(), 5)
    assert whole["top_k_indices"].max() < 20
    assert all(len(set(row.tolist())) == 5 for row in whole["top_k_indices"])
    halves = [dataset(random_selection=selection, rank=rank, world_size=2)[2] for rank in range(2)]
    divided = torch.cat([half["top_k_indices"] for half in halves])
    assert sorted(map(tuple, divided.tolist())) == sorted(map(tuple, whole["top_k_indices"].tolist()))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"harmful_batch_size": 0}, "harmful_batch_size must be positive"),
        ({"harmful_batch_size": 6, "world_size": 4}, "does not divide over 4 ranks x 1"),
        ({"gradient_accumulation_steps": 3}, "make it a multiple of 3"),
    ],
)
def test_batch_sizes_that_do_not_fit_are_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        dataset(**changes)


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="there is no utility data"):
        StepDataset(
            HARMFUL_ROWS,
            [],
            harmful_batch_size=1,
            utility_batch_size=1,
            max_steps=1,
            weights=RowWeights.from_options("both"),
            pad_token_id=PAD,
            seed=0,
        )


@pytest.mark.parametrize("distill_on", ["utility", "both"])
def test_answer_rows_number_the_predicted_tokens_in_the_order_of_the_data(distill_on):
    """Looked up in one long list of all answers, they give the tokens that follow the weighted rows."""
    weights = RowWeights.from_options(distill_on, completion_weight_harmful=float(distill_on == "both"))
    steps = dataset(weights=weights, world_size=2, rank=1, gradient_accumulation_steps=2)
    answers = torch.tensor([t for row in [*HARMFUL_ROWS, *UTILITY_ROWS] for t in row.input_ids[row.response_start :]])
    for item in range(len(steps)):
        batch = steps[item]
        predicted = batch["input_ids"].flatten()[batch["row_index"] + 1]
        assert torch.equal(answers[batch["answer_row"]], predicted)
        assert (batch["answer_row"] >= steps.answer_starts[UTILITY][0]).all() == (distill_on == "utility")

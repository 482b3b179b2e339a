"""The FSDP2 code of docs/training-launch.md, as it stands there, in one step of SGD on ranks and in one process."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from deepalign import CompletionLossConfig
from deepalign.data import response_mask_to_row_weights, weight_sums
from deepalign.output_head import hidden_states, output_head
from tests.tiny import FAMILIES, make_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "training-launch.md"
LEARNING_RATE = 0.5
CONFIG = CompletionLossConfig(top_k=5, lambda_reg=0.05)
TEMPLATE = make_tokenizer()


@cache
def documented(language: str) -> str:
    """The first code block of the page's part on FSDP in `language`: the module (python), the sharding (text)."""
    part = PAGE.read_text(encoding="utf-8").split("## FSDP instead of DeepSpeed")[1]
    found = re.search(rf"```{language}\n(.*?)```", part, re.DOTALL)
    assert found is not None, f"{PAGE.name} has no {language} block on FSDP"
    return found[1]


def model(seed: int, tied: bool) -> PreTrainedModel:
    return FAMILIES["llama"](seed, TEMPLATE, tie_word_embeddings=tied)


def batches(ranks: list[int]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs, response mask (B, T) and which rows are harmful (B,) of these ranks, whose answers differ in length."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(6, len(TEMPLATE), (4, 12), generator=generator)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    for row, length in enumerate((3, 8, 5, 2)):
        mask[row, -length:] = True
    rows = [row for rank in ranks for row in (2 * rank, 2 * rank + 1)]
    inputs = {"input_ids": input_ids[rows], "attention_mask": torch.ones(len(rows), 12, dtype=torch.int64)}
    return inputs, mask[rows], torch.tensor([1.0, 0.0])[torch.tensor(rows) % 2]


def step(student: torch.nn.Module, ranks: list[int], world_size: int, tied: bool) -> dict[str, Tensor]:
    """Forward, backward and SGD on the data of `ranks`; the parameters afterwards, whole."""
    inputs, mask, harmful = batches(ranks)
    _, whole_mask, whole_harmful = batches([0, 1])
    kl_sum, completion_sum = weight_sums(whole_mask, kl=1.0, completion=whole_harmful)
    rows = response_mask_to_row_weights(
        mask,
        kl=1.0,
        completion=harmful,
        kl_denominator=kl_sum,
        completion_denominator=completion_sum,
        world_size=world_size,
    )
    teachers = []
    for teacher in (model(0, tied), model(1, tied)):
        with torch.no_grad():
            hidden_RH = hidden_states(teacher, **inputs).flatten(0, 1)[rows.row_index]
        teachers += [hidden_RH, output_head(teacher).lm_head.detach()]
    optimizer = torch.optim.SGD(student.parameters(), LEARNING_RATE)
    student(inputs, rows, *teachers).backward()
    optimizer.step()
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.detach()
        for name, value in student.named_parameters()
    }


def names(tied: bool) -> dict[str, Any]:
    """What the page's code is run with, and what it defines."""
    found: dict[str, Any] = {"model": model(2, tied), "config": CONFIG, "vocab_size": len(TEMPLATE)}
    exec(compile(documented("python"), PAGE.name, "exec"), found)
    return found


def one_process(tied: bool) -> dict[str, Tensor]:
    """The step on the data of both ranks."""
    found = names(tied)
    student = found["WithCompletionLoss"](found["model"], CONFIG, found["vocab_size"])
    return step(student, [0, 1], 1, tied)


def sharded(tied: bool) -> dict[str, Tensor]:
    """The step of this rank among two, sharded as the page says."""
    found = names(tied) | {"fully_shard": fully_shard, "mesh": init_device_mesh("cpu", (2,))}
    exec(compile(documented("text"), PAGE.name, "exec"), found)
    assert all(isinstance(value, DTensor) for value in found["student"].parameters())
    return step(found["student"], [dist.get_rank()], 2, tied)

"""The linear loss inside the forward of a module whose parameters are sharded, one step of SGD per cell, on two ranks.

`run_cells` is for two ranks (`tests/train/forked.py`). Rank 0 writes {cell: {parameter: value after the step}}, and
what each refusal said.
"""

from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from deepalign import CompletionLossConfig, fused_linear_completion_loss
from deepalign.train.launch import join_deepspeed
from tests.kernels.linear_helpers import Models, linear_models
from tests.train import documented_fsdp

VOCAB, HIDDEN, LEARNING_RATE = 96, 16, 0.5
CONFIG = CompletionLossConfig(top_k=5, lambda_reg=0.05)
CELLS = [(tied, recompute) for tied in (False, True) for recompute in (False, True)]


class Student(nn.Module):
    """Embedding, a layer, a head that may be the embedding; forward returns the loss."""

    def __init__(self, tied: bool, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.recompute = recompute
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, teachers: Models) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(tokens)))
        return fused_linear_completion_loss(
            hidden, self.lm_head.weight, *teachers[2:], config=CONFIG, recompute=self.recompute, chunk_rows=4
        ).loss


def batch(rank: int) -> tuple[Tensor, Models]:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(VOCAB, (6,), generator=generator)
    return tokens, linear_models(6, vocab=VOCAB, sizes=(HIDDEN, 24, 16), seed=rank)


def one_process(tied: bool, recompute: bool) -> dict[str, Tensor]:
    """The step that two ranks take together."""
    student = Student(tied, recompute)
    optimizer = torch.optim.SGD(student.parameters(), LEARNING_RATE)
    sum(student(*batch(rank)) for rank in (0, 1)).div(2).backward()
    optimizer.step()
    return {name: value.detach() for name, value in student.named_parameters()}


def zero3(tied: bool, recompute: bool) -> dict[str, Tensor]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 where nothing is said
    }
    student = Student(tied, recompute)
    optimizer = torch.optim.SGD(student.parameters(), LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
    assert student.lm_head.weight.numel() == 0
    engine.backward(engine(*batch(dist.get_rank())))
    engine.step()
    with deepspeed.zero.GatheredParameters(list(student.parameters())):
        return {name: value.detach().clone() for name, value in student.named_parameters()}


def fsdp2(tied: bool, recompute: bool) -> dict[str, Tensor]:
    student = Student(tied, recompute)
    fully_shard(student, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    optimizer = torch.optim.SGD(student.parameters(), LEARNING_RATE)
    student(*batch(dist.get_rank())).backward()
    optimizer.step()
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.detach()
        for name, value in student.named_parameters()
    }


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"


def refusals() -> dict[str, str]:
    """A head that is not whole where the loss is called."""
    sharded = Student(tied=False, recompute=False)
    fully_shard(sharded.lm_head, mesh=init_device_mesh("cpu", (2,)))
    partitioned = Student(tied=False, recompute=False)
    zero = {"zero_optimization": {"stage": 3}, "train_batch_size": 2}
    deepspeed.zero.Init(module=partitioned.lm_head, config_dict_or_path=zero)
    return {name: refusal(lambda s=s: s(*batch(0))) for name, s in (("fsdp2", sharded), ("zero3", partitioned))}


def run_cells(out: Path) -> None:
    """Every cell and every refusal, on this rank."""
    join_deepspeed("gloo")
    torch.set_num_threads(1)
    found = {}
    for tied, recompute in CELLS:
        for kind in (fsdp2, zero3):
            found[f"{kind.__name__}-{tied}-{recompute}"] = kind(tied, recompute)
    for tied in (False, True):
        found[f"documented-{tied}"] = documented_fsdp.sharded(tied)
    found["refusals"] = refusals()
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()

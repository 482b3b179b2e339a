"""Rows of `benchmarks.gpu linear`: the linear loss on a GPU beside its bare products and the nearest relatives.

The relatives, where they install, do less: two models instead of three, one divergence, nothing selected or counted.
TRL's chunked divergence keeps float32 logits of a chunk and checkpoints it; Liger's fused-linear JSD computes gradients
in the forward. The bare products are as many as the loss needs, 4 or 5, with a float32 result, chunk by chunk: on a GPU
all rows of logits at once would not fit.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import Contestant
from benchmarks.linear import LinearCase, LinearContestants
from deepalign.kernels.half_products import wide_product
from deepalign.kernels.linear_rows import choose_chunk_rows
from deepalign.kernels.products import product_

ROWS, HIDDEN, VOCAB = 8192, 4096, 128256


def bare_products(made: LinearContestants, chunk_rows: int) -> Contestant:
    """The products alone, into buffers that are there, of operands that are in half precision already."""
    case, device = made.case, made.case.device
    hidden, heads = [h.detach() for h in made.hidden], [w.detach() for w in made.heads]
    logits = torch.empty(chunk_rows, case.vocab, device=device)
    gradient = torch.zeros(chunk_rows, case.vocab, device=device, dtype=torch.float16)
    half_head, half_hidden = heads[0].half(), hidden[0].half()
    dlm_head = torch.zeros(case.vocab, case.hidden, device=device) if case.head else None

    def call() -> None:
        for first in range(0, case.rows, chunk_rows):
            rows = slice(first, min(first + chunk_rows, case.rows))
            count = rows.stop - rows.start
            for h, w in zip(hidden, heads, strict=True):
                product_(h[rows], w.t(), logits[:count])
            wide_product(gradient[:count], half_head)
            if dlm_head is not None:
                wide_product(gradient[:count].t(), half_hidden[rows], add_to=dlm_head)

    return Contestant(call)


def relatives(made: LinearContestants) -> dict[str, Contestant]:
    """TRL's and Liger's losses, those that are installed."""
    losses: dict[str, Callable[[], Tensor]] = {}
    (student, teacher, _), (student_head, teacher_head, _) = made.hidden, made.heads
    if find_spec("trl"):
        try:
            chunked = import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
        except (ImportError, AttributeError) as error:
            print(f"TRL's chunked divergence is left out: {error}")
        else:
            mask = torch.ones(1, made.case.rows, dtype=torch.int64, device=made.case.device)
            losses["trl_chunked_divergence (does less)"] = lambda: chunked(
                student[None], teacher[None], student_head, teacher_head, mask, beta=1.0, chunk_size=1024
            )[0]
    if find_spec("liger_kernel"):
        jsd = import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD()
        losses["liger_fused_linear_jsd (does less)"] = lambda: jsd(student, student_head, teacher, teacher_head)
    return {name: Contestant(partial(_backward, loss), made.prepare) for name, loss in losses.items()}


def _backward(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def linear_rows(
    options: argparse.Namespace, take_turns: Callable[[dict[str, Contestant]], dict[str, dict[str, float]]]
) -> Iterator[dict[str, Any]]:
    """Time of every contestant, and peak memory beyond models and gradients, with a frozen and a trained head."""
    on_gpu = options.device == "cuda"
    size = (16, 64, 500) if options.tiny else (ROWS, HIDDEN, VOCAB)
    for head in (False, True):
        made = LinearContestants(LinearCase(*size, head, options.device))
        head_bytes = 2 * size[1] * size[2]
        chosen = choose_chunk_rows(size[0], size[2], torch.device(options.device), 3.5, head_bytes)
        chunk_rows = 8 if options.tiny else chosen
        entered = {
            "library": made.library(chunk_rows=chunk_rows),
            "library, recompute": made.library(recompute=True, chunk_rows=chunk_rows),
        }
        entered["bare products"] = bare_products(made, chunk_rows)
        if "eager" in options.peers:
            entered["eager, chunked"] = made.eager(not on_gpu, rows_at_a_time=min(1024, size[0] // 2))
        if on_gpu:
            entered |= relatives(made)
        products = 2 * made.case.products * size[0] * size[1] * size[2]
        for name, times in take_turns(entered).items():
            row = {"operation": "linear_completion_loss", "case": str(made.case), "contestant": name, **times}
            row["tflop_per_s"] = products / times["ms"] / 1e9
            if on_gpu:
                row["peak_gb"] = peak_gb(entered[name])
            yield row


def peak_gb(contestant: Contestant) -> float:
    """GB that one call holds at most beyond what is there before; gradients that it leaves are included."""
    contestant.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contestant.call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9

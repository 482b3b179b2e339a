"""Time of the position analysis of 100 answers x 64 positions at V = 128256, against eager PyTorch, on the CPU.

    python -m benchmarks.diagnosis --threads 1 --out benchmarks/results/diagnosis-cpu.json

Both get the same bf16 hidden states and heads, and both end with the same numbers: seven statistics and the 100 most
base-favored tokens of every row.

    ours          `measure_rows` and the record of every answer, written and synced to disk; a batch of 8 answers
    eager         logits of both models for one answer, bf16 products converted to float32 (the fastest; its rounding
                  shows in the numbers), then the formulas in as few passes as torch has: no special cases, no ties to
                  the lowest index
    eager_blocks  the same over 8 rows at a time, whose temporaries stay in cache

Rounds interleave the contestants in one process, one batch of answers each, memory kept (`benchmarks/allocator.py`).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import allocator
from benchmarks.environment import machine, row_environment
from benchmarks.interleaved import spread
from deepalign.data.files import write_text_atomic
from deepalign.diagnose.records import make_records, record_type, writing
from deepalign.diagnose.rows import ModelRows, RowOptions, RowStatistics, measure_rows
from deepalign.kernels.library import cpu_isa
from deepalign.output_head import OutputHead

ANSWERS, POSITIONS, VOCAB, TOP, BATCH, BLOCK_ROWS = 100, 64, 128256, 100, 8, 8
LOGITS_STD, NOISE = 4.3, 0.3  # logits like a language model's; base is aligned with noise


def models(hidden_size: int) -> tuple[OutputHead, OutputHead]:
    """Two heads (V, H), bf16."""
    generator = torch.Generator().manual_seed(0)
    scale = LOGITS_STD / hidden_size**0.5
    aligned, noise = (torch.randn(VOCAB, hidden_size, generator=generator) * scale for _ in range(2))
    return OutputHead(aligned.bfloat16()), OutputHead((aligned + NOISE * noise).bfloat16())


def answers(count: int, hidden_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states (count x 64, H) of both models, bf16."""
    generator = torch.Generator().manual_seed(seed)
    aligned = torch.randn(count * POSITIONS, hidden_size, generator=generator)
    other = torch.randn(count * POSITIONS, hidden_size, generator=generator)
    return aligned.bfloat16(), (aligned + NOISE * other).bfloat16()


def eager(aligned_NH: Tensor, base_NH: Tensor, heads: tuple[OutputHead, OutputHead]) -> RowStatistics:
    """All rows given, logits of both models held."""
    a_NV, b_NV = (F.linear(h, head.lm_head).float() for h, head in zip((aligned_NH, base_NH), heads, strict=True))
    return formulas(a_NV, b_NV)


def eager_blocks(aligned_NH: Tensor, base_NH: Tensor, heads: tuple[OutputHead, OutputHead]) -> RowStatistics:
    """The products over all rows given, the formulas over a few at a time."""
    a_NV, b_NV = (F.linear(h, head.lm_head) for h, head in zip((aligned_NH, base_NH), heads, strict=True))
    blocks = zip(a_NV.split(BLOCK_ROWS), b_NV.split(BLOCK_ROWS), strict=True)
    found = [formulas(a_RV.float(), b_RV.float()) for a_RV, b_RV in blocks]
    return RowStatistics(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def formulas(a_NV: Tensor, b_NV: Tensor) -> RowStatistics:
    """The statistics as PyTorch users would write them, in float32."""
    top_a_NK, top_b_NK = a_NV.topk(TOP, dim=-1).indices, b_NV.topk(TOP, dim=-1).indices
    tokens_NK = (b_NV - a_NV).topk(TOP, dim=-1).indices
    log_a_NV, log_b_NV = F.log_softmax(a_NV, -1), F.log_softmax(b_NV, -1)
    p_a_NV, p_b_NV = log_a_NV.exp(), log_b_NV.exp()
    entropies_N = torch.linalg.vecdot(p_a_NV, log_a_NV) + torch.linalg.vecdot(p_b_NV, log_b_NV)
    ratio_NV = log_b_NV.sub_(log_a_NV)
    kl_N, reverse_N = -torch.linalg.vecdot(p_a_NV, ratio_NV), torch.linalg.vecdot(p_b_NV, ratio_NV)
    mean_NV = p_a_NV.add_(p_b_NV).mul_(0.5)
    jsd_N = entropies_N.mul_(0.5) - torch.linalg.vecdot(mean_NV, mean_NV.log())
    favored_NV = ratio_NV > 0
    member_NV = torch.zeros_like(favored_NV).scatter_(-1, top_a_NK, True)
    return RowStatistics(
        kl=kl_N,
        reverse_kl=reverse_N,
        jsd=jsd_N,
        top_overlap=member_NV.gather(-1, top_b_NK).sum(-1) / TOP,
        favored_count=favored_NV.sum(-1),
        favored_in_top=favored_NV.gather(-1, top_a_NK).sum(-1),
        favored_in_base_top=favored_NV.gather(-1, top_b_NK).sum(-1),
        favored_tokens=tokens_NK,
    )


def per_answer(function: Any, hidden: tuple[Tensor, Tensor], heads: tuple[OutputHead, OutputHead]) -> RowStatistics:
    """One answer at a time."""
    found = [function(a, b, heads) for a, b in zip(*(h.split(POSITIONS) for h in hidden), strict=True)]
    return RowStatistics(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def check(
    ours: RowStatistics, theirs: RowStatistics, hidden: tuple[Tensor, Tensor], heads: tuple[OutputHead, OutputHead]
) -> dict[str, float]:
    """Compare the first answer's KL with that of float32 logits; returns the largest errors of both sides, in nats."""
    a_NV, b_NV = (F.linear(h[:POSITIONS].float(), head.lm_head.float()) for h, head in zip(hidden, heads, strict=True))
    exact = formulas(a_NV, b_NV)
    for name in ("kl", "reverse_kl", "jsd"):
        assert torch.allclose(getattr(ours, name)[:POSITIONS], getattr(exact, name), rtol=1e-3, atol=1e-4), name
    counts = ours.favored_in_base_top[:POSITIONS] - exact.favored_in_base_top  # two products round their sums otherwise
    assert counts.abs().max() <= 1, counts.abs().max()
    return {
        name: float((side.kl[:POSITIONS] - exact.kl).abs().max()) for name, side in (("ours", ours), ("eager", theirs))
    }


def measure(hidden_size: int, threads: int, answer_count: int, everybody: list[str]) -> dict[str, Any]:
    """Seconds per batch of answers of every contestant, and what they say together."""
    torch.set_num_threads(threads)
    allocator.keep_memory()
    heads, options, record = models(hidden_size), RowOptions(TOP, TOP), record_type(POSITIONS, TOP)
    seconds: dict[str, list[float]] = {name: [] for name in everybody}
    responses = [[0] * POSITIONS] * BATCH
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.inference_mode(),
        writing(Path(folder) / "r", record, {}, answer_count + BATCH, BATCH) as file,
    ):

        def ours(hidden: tuple[Tensor, Tensor]) -> RowStatistics:
            aligned, base = (ModelRows(h, head) for h, head in zip(hidden, heads, strict=True))
            rows = measure_rows(aligned, base, options)
            count = len(hidden[0]) // POSITIONS
            file.append(make_records(rows, responses[:count], [0] * count, record))
            return rows

        contestants = {
            "ours": ours,
            "eager": lambda hidden: per_answer(eager, hidden, heads),
            "eager_blocks": lambda hidden: per_answer(eager_blocks, hidden, heads),
        }
        for start in range(-BATCH, answer_count, BATCH):  # the first batch warms up and is checked
            hidden = answers(min(BATCH, answer_count - max(start, 0)) if start >= 0 else BATCH, hidden_size, start)
            found = {}
            for name in everybody:
                began = time.perf_counter()
                found[name] = contestants[name](hidden)
                if start >= 0:
                    seconds[name].append(time.perf_counter() - began)
            if start < 0:
                errors = check(found["ours"], found["eager"], hidden, heads)
    return {
        "answers": answer_count,
        "positions": POSITIONS,
        "vocab": VOCAB,
        "hidden": hidden_size,
        "dtype": "bfloat16",
        **row_environment("cpu" if cpu_isa() else "reference", "cpu"),
        "largest_kl_error_nats": errors,
        "total_s": {name: sum(values) for name, values in seconds.items()},
        "ms_per_row": {name: 1e3 * sum(values) / (answer_count * POSITIONS) for name, values in seconds.items()},
        "ratio_p10_median_p90": {
            name: spread([other / own for other, own in zip(seconds[name], seconds["ours"], strict=True)])
            for name in everybody[1:]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--answers", type=int, default=ANSWERS)
    parser.add_argument("--without-blocks", action="store_true", help="leave the third contestant out")
    parser.add_argument("--out", type=Path, help="JSON; rows are appended to those it has")
    options = parser.parse_args()
    everybody = ["ours", "eager"] + ([] if options.without_blocks else ["eager_blocks"])
    row = measure(options.hidden, options.threads, options.answers, everybody)
    print(json.dumps(row, indent=1))
    if options.out is not None:
        known: dict[str, Any] = {"machine": machine(), "rows": []}
        if options.out.exists():
            known = json.loads(options.out.read_text())
        known["rows"].append(row)
        write_text_atomic(options.out, json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()

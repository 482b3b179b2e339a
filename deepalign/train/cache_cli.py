"""`deepalign cache-teacher`: compute the hidden states of the frozen teachers once, before training.

    deepalign cache-teacher --config X.yaml                                   # one process
    torchrun --nproc-per-node 8 -m deepalign.train.cache_cli --config X.yaml  # a process per GPU
    deepspeed --module deepalign.train.cache_cli --config X.yaml              # the same, or over a hostfile

The configuration is that of the training: models, data, `max_length`, `bf16`, and `teacher_cache`, the folder.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from deepalign.data.chat import EncodedExample
from deepalign.models import load_frozen_model, set_cpu_threads
from deepalign.train.checks import check_paths, check_quantization
from deepalign.train.config import load_config
from deepalign.train.frozen_heads import empty_output_head
from deepalign.train.prepare import load_common_tokenizer, load_streams
from deepalign.train.ranks import FirstRankError, Ranks
from deepalign.train.teacher_cache import DTYPES, CacheIndex, plan_shards
from deepalign.train.teacher_cache_write import MIB, Report, Teacher, write_teacher_cache
from deepalign.train.teacher_fingerprint import model_folder
from deepalign.train.teacher_models import cache_fingerprint, quantization_options
from deepalign.train.teachers import move_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deepalign cache-teacher`; further words override keys of the configuration."""
    parser.add_argument("--config", required=True, help="YAML file of the training; its keys can follow as --key value")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the stored states (default: bfloat16)")
    parser.add_argument(
        "--shard-mib", type=float, default=64.0, help="size of a shard (default 64): what a crash loses"
    )
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of one forward (default 8192)")
    parser.add_argument("--overwrite", action="store_true", help="delete a cache that is there and start again")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    parser.add_argument("--local_rank", type=int, default=None, help="set by the launcher")


def run(options: argparse.Namespace, overrides: Sequence[str] = ()) -> int:
    """Write the cache; to be called by every rank.

    Raises:
        ValueError, TypeError, OSError, RuntimeError: what is wrong and what to do.
    """
    ranks = Ranks.from_launcher()
    plan = ranks.on_first(lambda: _plan(options, overrides))
    if not plan.on_gpu:
        set_cpu_threads()
    report = write_teacher_cache(
        plan.folder,
        plan.index,
        {name: Teacher(path, partial(_load, path, plan)) for name, path in plan.paths.items()},
        plan.examples,
        plan.pad_token_id,
        ranks=ranks,
        batch_tokens=options.batch_tokens,
        overwrite=options.overwrite,
        progress=not options.no_progress,
    )
    if ranks.is_first:
        print(table(report), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


@dataclass(frozen=True)
class _Plan:
    """What rank 0 tells the others."""

    folder: Path
    index: CacheIndex
    paths: dict[str, str]
    examples: list[EncodedExample]
    pad_token_id: int
    dtype: torch.dtype
    quantization: str | None
    on_gpu: bool


def _plan(options: argparse.Namespace, overrides: Sequence[str]) -> _Plan:
    for name in ("shard_mib", "batch_tokens"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be positive")
    config = load_config(options.config, overrides)
    if config.teacher_cache is None:
        raise ValueError("teacher_cache is not set; give the folder to write, here or in the configuration")
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    check_paths(config)
    check_quantization(config, on_gpu)
    tokenizer = load_common_tokenizer(config)
    harmful, utility = load_streams(config, tokenizer, verbose=True)
    dtype = torch.bfloat16 if config.in_bf16(on_gpu) else torch.float32
    paths = {"aligned": config.aligned, "base": config.base}
    hidden_sizes = {name: _hidden_size(path) for name, path in paths.items()}
    examples = [*harmful, *utility]
    lengths = [example.response_length for example in examples]
    # the same examples are in a shard of either teacher; the wider one decides how many
    row_bytes = max(hidden_sizes.values()) * DTYPES[options.dtype].itemsize
    index = CacheIndex(
        fingerprint=cache_fingerprint(config, dtype, tokenizer, harmful, utility),
        dtype=options.dtype,
        hidden_sizes=hidden_sizes,
        streams={"harmful": len(harmful), "utility": len(utility)},
        answer_lengths=lengths,
        shard_starts=plan_shards(lengths, row_bytes, int(options.shard_mib * MIB)),
    )
    return _Plan(
        folder=Path(config.teacher_cache),
        index=index,
        paths=paths,
        examples=examples,
        pad_token_id=int(tokenizer.pad_token_id),
        dtype=dtype,
        quantization=config.teacher_quantization,
        on_gpu=on_gpu,
    )


def _load(path: str, plan: _Plan) -> PreTrainedModel:
    model = load_frozen_model(path, plan.dtype, quantization_options(plan.quantization, plan.dtype))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if plan.on_gpu else torch.device("cpu")
    move_model(model, device)
    return model


def table(report: Report) -> str:
    """What was found and done, as Markdown."""
    head = ("teacher", "shards found", "written", "rows", "MiB", "load s", "compute s", "tokens/s", "MiB/s")
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for name, work in report.work.items():
        seconds = max(work.seconds, 1e-9)
        rates = (f"{work.tokens / seconds:.0f}", f"{work.bytes / MIB / seconds:.1f}") if work.shards else ("", "")
        cells = (name, report.found[name], work.shards, work.rows, f"{work.bytes / MIB:.1f}")
        lines.append(" | ".join(map(str, (*cells, f"{work.loading:.1f}", f"{work.seconds:.1f}", *rates))))
    return "\n".join(f"| {line} |" for line in lines)


def _hidden_size(path: str) -> int:
    return empty_output_head(str(model_folder(path)))[0].lm_head.shape[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, for launchers; returns the exit code (2: refused, with one message on stderr)."""
    parser = argparse.ArgumentParser(prog="deepalign cache-teacher", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_arguments(parser)
    options, overrides = parser.parse_known_args(arguments)
    try:
        return run(options, overrides)
    except FirstRankError:
        return 2
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        rank = os.environ.get("RANK")
        print(f"error: {'' if rank is None else f'rank {rank}: '}{error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())

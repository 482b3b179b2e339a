"""Looking at a run without running it: `--dry_run` (memory and time) and `--show_example N` (decoded rows and weights).

    python -m deepalign.train.run --config X.yaml --dry_run --ranks 8 --tflops 400 --device_gib 80
    python -m deepalign.train.run --config X.yaml --show_example 2

Both take one process and load no weights. A dry run reads the models' configurations and, where it can, the data:
without them it takes every row to be `max_length` tokens long, half of them answer, and says so.
"""

import argparse
from dataclasses import dataclass, replace
from typing import get_args

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from deepalign.data.show import show_batch
from deepalign.data.steps import StepDataset
from deepalign.models import load_model_config, longest_example
from deepalign.train.config import LoraConfig, TrainConfig
from deepalign.train.estimate import GIB, Load, ModelSize, Setup, Zero, matmul_rate, memory_parts, step_work
from deepalign.train.prepare import load_common_tokenizer, load_streams, step_count, step_dataset
from deepalign.train.teacher_models import student_is_aligned

SAMPLED_STEPS = 50
ZEROS: tuple[Zero, ...] = get_args(Zero)
# Of the rate of bare products; attention, norms and copies take the rest. docs/training-launch.md has measured runs.
EFFICIENCY = 0.5


def add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the two previews."""
    group = parser.add_argument_group("look, do not train")
    group.add_argument("--dry_run", "--dry-run", action="store_true", help="print memory and time estimates and stop")
    group.add_argument("--ranks", type=int, default=None, help="dry run: number of ranks (default: world_size, or 1)")
    group.add_argument("--tflops", type=float, default=None, help="dry run: sustained TFLOP/s of a rank's device")
    group.add_argument("--device_gib", type=float, default=None, help="dry run: memory of a rank's device")
    group.add_argument("--device", choices=("gpu", "cpu"), default=None, help="dry run: device (default: use_cpu)")
    group.add_argument(
        "--show_example", "--show-example", type=int, default=0, metavar="N", help="print N decoded rows"
    )


def preview(options: argparse.Namespace, config: TrainConfig) -> bool:
    """Print what was asked for; False if nothing was.

    Args:
        options: parsed with `add_preview_arguments`.
        config: of the run.

    Raises:
        ValueError, OSError, RuntimeError: what is wrong with the data (`--show_example`) or with the numbers.
    """
    if options.show_example:
        dataset, tokenizer = _rank_0(config, 1)
        print(show_batch(tokenizer, dataset[0], options.show_example))
    if options.dry_run:
        print(dry_run(options, config))
    return bool(options.show_example or options.dry_run)


def dry_run(options: argparse.Namespace, config: TrainConfig) -> str:
    """The estimates as text.

    Raises:
        ValueError: fewer than one rank, or batch sizes that do not divide over the ranks.
        OSError: the models' configurations cannot be read.
    """
    ranks = options.ranks if options.ranks is not None else config.world_size or 1
    if ranks < 1:
        raise ValueError(f"--ranks is {ranks}; expected at least 1")
    model = load_model_config(config.student or config.aligned)
    load, average, source = _workload(config, ranks, longest_example(config.max_length, model))
    on_gpu = options.device == "gpu" or (options.device is None and not config.use_cpu)
    setup = _setup(config, ranks, on_gpu)
    lora = config.lora or LoraConfig()
    sizes = {"all weights": ModelSize.of(model), f"LoRA, r {lora.r}": ModelSize.of(model, lora)}
    names = list(sizes)
    chosen = sizes[names[config.lora is not None]]
    blocks = [
        f"{config.student or config.aligned}: {chosen.parameters / 1e9:.3f} G weights, "
        f"{chosen.trainable / 1e9:.3f} G trained; {ranks} rank(s), {'bf16' if setup.bf16 else 'fp32'}, "
        f"{'GPU' if on_gpu else 'CPU'}, checkpointing {'on' if setup.checkpointing else 'off'}, "
        f"teachers {config.teacher}",
        f"largest micro-batch {load.rows} x {load.tokens} tokens, {load.weighted} read by the loss ({source})",
    ]
    for name, size in sizes.items():
        blocks.append(_memory_table(name, model, size, setup, load, options.device_gib, size is chosen))
    other = replace(setup, checkpointing=not setup.checkpointing)
    bytes_other = memory_parts(model, chosen, other, load)["activations"]
    state = "on" if other.checkpointing else "off"
    blocks.append(f"activations with checkpointing {state}: {bytes_other / GIB:.2f} GiB")
    blocks.append(_time(options, model, chosen, setup, average))
    return "\n\n".join(blocks)


def _rank_0(config: TrainConfig, ranks: int) -> tuple[StepDataset, PreTrainedTokenizerBase]:
    """The micro-batches of rank 0 as the run will see them, and the tokenizer; no model is loaded."""
    tokenizer = load_common_tokenizer(config)
    harmful, utility = load_streams(config, tokenizer, verbose=True)
    dataset = step_dataset(
        config,
        tokenizer,
        harmful,
        utility,
        vocab_size=len(tokenizer),
        max_steps=step_count(config, len(harmful)),
        rank=0,
        world_size=ranks,
    )
    return dataset, tokenizer


def _setup(config: TrainConfig, ranks: int, on_gpu: bool) -> Setup:
    own_file: Zero = "none" if config.deepspeed is None else "zero3"
    zero = next((name for name in ZEROS if name == config.deepspeed), own_file)
    return Setup(
        zero=zero,
        ranks=ranks,
        bf16=config.in_bf16(on_gpu),
        on_gpu=on_gpu,
        checkpointing=config.is_checkpointing(on_gpu),
        teachers=1 if student_is_aligned(config) and config.teacher == "online" else 2,
        teachers_cached=config.teacher == "cache",
        accumulation=config.gradient_accumulation_steps,
        loss_form=config.loss_form,
    )


@dataclass(frozen=True)
class Average:
    """Of one rank's step: tokens (padding included), weighted rows, the width of a row; and the number of steps."""

    tokens: float
    weighted: float
    length: float
    steps: int | None


def _workload(config: TrainConfig, ranks: int, longest: int) -> tuple[Load, Average, str]:
    """The largest micro-batch, averages over a step, and where they come from."""
    accumulation = config.gradient_accumulation_steps
    try:
        dataset, _ = _rank_0(config, ranks)
    except (OSError, RuntimeError) as error:
        rows = (config.harmful_batch_size + config.utility_batch_size) // (ranks * accumulation)
        load = Load(rows, longest, rows * longest // 2, packed=config.packing)
        average = Average(accumulation * rows * longest, accumulation * load.weighted, longest, config.max_steps)
        return load, average, f"ASSUMED, since the data could not be read: {error}"
    steps = min(dataset.max_steps, SAMPLED_STEPS)
    batches = [dataset[i] for i in range(steps * accumulation)]
    shapes = [tuple(batch["input_ids"].shape) for batch in batches]
    weighted = [batch["row_index"].numel() for batch in batches]
    rows, width = max(shapes, key=lambda shape: shape[0] * shape[1])
    load = Load(rows, width, max(weighted), packed=False)  # a packed batch is one long row already
    tokens = sum(rows * width for rows, width in shapes) / steps
    mean_width = sum(width for _, width in shapes) / len(shapes)
    average = Average(tokens, sum(weighted) / steps, mean_width, dataset.max_steps)
    return load, average, f"the largest of {len(batches)} sampled"


def _memory_table(
    name: str,
    model: PreTrainedConfig,
    size: ModelSize,
    setup: Setup,
    load: Load,
    device_gib: float | None,
    chosen: bool,
) -> str:
    columns = {zero: memory_parts(model, size, replace(setup, zero=zero), load) for zero in ZEROS}
    lines = [f"GiB per rank, {name}{' (this run)' if chosen else ''}"]
    lines.append(
        f"{'':<14}" + "".join(f"{zero + (' <' if chosen and zero == setup.zero else ''):>10}" for zero in ZEROS)
    )
    for part in columns["none"]:
        lines.append(f"{part:<14}" + "".join(f"{columns[zero][part] / GIB:>10.2f}" for zero in ZEROS))
    if device_gib is not None:
        fits = ("yes" if columns[zero]["peak"] < device_gib * GIB else "no" for zero in ZEROS)
        lines.append(f"{f'in {device_gib:g} GiB':<14}" + "".join(f"{answer:>10}" for answer in fits))
    return "\n".join(lines)


def _time(
    options: argparse.Namespace,
    model: PreTrainedConfig,
    size: ModelSize,
    setup: Setup,
    average: Average,
) -> str:
    work = step_work(model, size, setup, average.tokens, average.weighted, average.length)
    if options.tflops is not None:
        rate, origin = options.tflops * 1e12, "given"
    else:
        device = torch.device("cuda" if torch.cuda.is_available() and setup.on_gpu else "cpu")
        rate = EFFICIENCY * matmul_rate(device, setup.dtype)
        origin = f"{EFFICIENCY:g} of this machine's {device.type} products"
    seconds = work.seconds(rate)
    parts = ", ".join(f"{name} {getattr(work, name) / 1e12:.3g}" for name in ("student", "teachers", "loss"))
    lines = [
        f"one step of one rank: {work.total / 1e12:.3g} TFLOP ({parts}); weights and gradients sent: "
        f"{work.sent_bytes / GIB:.2f} GiB",
        f"at {rate / 1e12:.3g} TFLOP/s ({origin}): {seconds:.3g} s a step without communication",
    ]
    if average.steps is not None:
        lines.append(f"{average.steps} steps: {average.steps * seconds / 3600:.3g} h")
    return "\n".join(lines)

"""Targeted completion training, the entry point.

    deepspeed deepalign/train/run.py --config X.yaml [--key value ...]     # from a checkout
    deepspeed --module deepalign.train.run --config X.yaml                 # from an installed package
    python -m deepalign.train.run --config X.yaml                          # one process, without the launcher

What happens, in order: read and check the configuration, check this machine, read and encode the data, load the frozen
teachers, load the student, train (from the last checkpoint where there is one), write `final/`. Everything that can be
refused is refused before the models are trained, in one message.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from deepalign import __version__
from deepalign.data.chat import EncodedExample, encode_example
from deepalign.data.files import read_jsonl, write_text_atomic
from deepalign.data.steps import RandomSelection, RowWeights, StepDataset, check_batch_size
from deepalign.kernels.checks import choose_implementation
from deepalign.kernels.completion_loss import IMPLEMENTATIONS
from deepalign.models import (
    check_model_path,
    check_same_tokenizer,
    load_frozen_model,
    load_model,
    load_tokenizer,
    logits_width,
    set_cpu_threads,
)
from deepalign.train.config import TrainConfig, config_as_dict, deepspeed_config_path, load_config
from deepalign.train.launch import free_port
from deepalign.train.trainer import (
    METRICS_FILE,
    RESUME_FILE,
    CompletionTrainer,
    checkpoints,
)

# Settings that may change between an interrupted run and its continuation.
FREE_ON_RESUME = {"output_dir", "logging_steps", "save_steps", "save_total_limit", "resume", "report_to", "world_size"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training from the command line; returns the exit code (2: refused, with one message on stderr)."""
    parser = argparse.ArgumentParser(description="targeted completion training", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="YAML file; any of its keys can follow as --key value")
    parser.add_argument("--local_rank", type=int, default=None, help="set by the launcher")
    known, overrides = parser.parse_known_args(arguments)
    try:
        run = prepare(load_config(known.config, overrides))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    run.train()
    return 0


@dataclass
class Run:
    """A checked training run, ready to start."""

    config: TrainConfig
    trainer: CompletionTrainer
    checkpoint: Path | None

    def train(self) -> None:
        """Train to the end and write `final/` and `run.json`."""
        self.trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        output_dir = Path(self.config.output_dir)
        self.trainer.save_final(output_dir / "final")
        self.trainer.restore_forward()
        if self.trainer.is_world_process_zero():
            summary = {
                "config": config_as_dict(self.config),
                "steps": self.trainer.state.global_step,
                "world_size": self.trainer.args.world_size,
                "versions": versions(),
            }
            write_text_atomic(output_dir / "run.json", json.dumps(summary, indent=2) + "\n")
            print(
                f"trained {summary['steps']} steps; model: {output_dir / 'final'}, metrics: {output_dir / METRICS_FILE}"
            )


def prepare(config: TrainConfig) -> Run:
    """Check everything, load everything.

    Raises:
        ValueError, TypeError, FileNotFoundError, RuntimeError: what is wrong and what to do, before any training.
    """
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    _check_paths(config)
    _check_machine(config, on_gpu, world_size)
    if not on_gpu:
        set_cpu_threads()

    tokenizer = _load_common_tokenizer(config)
    harmful, utility = _load_streams(config, tokenizer, verbose=rank == 0)
    for stream, size, rows in (
        ("harmful", config.harmful_batch_size, harmful),
        ("utility", config.utility_batch_size, utility),
    ):
        check_batch_size(stream, size, len(rows), world_size, config.gradient_accumulation_steps)
    identity = _run_identity(config, world_size, harmful, utility)
    checkpoint = _checkpoint_to_resume(config, identity)

    bf16 = on_gpu if config.bf16 is None else config.bf16
    # Under ZeRO-3 everything that is loaded after TrainingArguments is partitioned: the teachers come before, to stay
    # whole, and an earlier run in this process must not have left its partitioning on.
    unset_hf_deepspeed_config()
    teacher_dtype = torch.bfloat16 if bf16 else torch.float32
    aligned, base = (load_frozen_model(path, teacher_dtype) for path in (config.aligned, config.base))
    args = _training_arguments(config, bf16, on_gpu, len(harmful), world_size)
    student = _load_student(config, args, world_size)
    trainer = CompletionTrainer(
        model=student,
        aligned=aligned,
        base=base,
        args=args,
        train_dataset=_step_dataset(config, args, tokenizer, harmful, utility, (student, aligned, base)),
        processing_class=tokenizer,
        loss_config=config.loss,
        implementation=config.implementation,
        run_identity=identity,
        save_total_limit=config.save_total_limit,
    )
    return Run(config, trainer, checkpoint)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import accelerate
    import deepspeed

    packages = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "deepspeed": deepspeed}
    named = {name: str(package.__version__) for name, package in packages.items()}
    return {"deepalign": __version__, "python": sys.version.split()[0], **named}


# ---- checks ----


def _check_paths(config: TrainConfig) -> None:
    for name in ("aligned", "base", "student"):
        value = getattr(config, name)
        if value is not None:
            check_model_path(name, value)
    for name in ("harmful_data", "utility_data"):
        value = getattr(config, name)
        if value is not None and not Path(value).is_file():
            raise FileNotFoundError(f"{name}: the file {value} does not exist")
    if config.deepspeed is not None:
        deepspeed_config_path(config.deepspeed)
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir: {output_dir} is a file; give a folder")
    if config.resume == "never" and checkpoints(output_dir):
        raise ValueError(
            f"output_dir {output_dir} already holds checkpoints and resume is 'never'; give another folder, or "
            "resume: auto to go on from the last one"
        )


def _check_machine(config: TrainConfig, on_gpu: bool, world_size: int) -> None:
    if config.world_size is not None and config.world_size != world_size:
        raise ValueError(
            f"world_size is {config.world_size} but {world_size} rank(s) were started; on a machine without GPUs start "
            f"`deepspeed --num_accelerators {config.world_size} ...` (the launcher starts one rank otherwise)"
        )
    if config.implementation is not None:
        choose_implementation(IMPLEMENTATIONS, config.implementation, torch.device("cuda" if on_gpu else "cpu"))
    if config.deepspeed is None:
        return
    if not on_gpu:
        _check_toolchain()
    if "WORLD_SIZE" not in os.environ:
        # one process without the launcher: what the launcher would have set
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", str(free_port()))


def _check_toolchain() -> None:
    """DeepSpeed compiles its shared-memory collectives at start-up on a CPU: a compiler and ninja must be at hand."""
    beside_python = Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside_python / "ninja").exists():
        os.environ["PATH"] = f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}"
    compiler = os.environ.get("CXX", "g++")
    for program, package in ((compiler, "the package g++ of your system"), ("ninja", "`pip install ninja`")):
        if shutil.which(program) is None:
            raise RuntimeError(
                f"{program} was not found; DeepSpeed on a CPU compiles its communication ops at start-up and needs it. "
                f"Install {package}, or train without deepspeed (deepspeed: null)"
            )


# ---- what is trained on what ----


def _load_common_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(config.aligned)
    for name in ("base", "student"):
        path = getattr(config, name)
        if path is not None and path != config.aligned:
            check_same_tokenizer("aligned", tokenizer, name, load_tokenizer(path))
    return tokenizer


def _load_streams(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, verbose: bool
) -> tuple[list[EncodedExample], list[EncodedExample]]:
    paths = {config.aligned, config.base, config.student or config.aligned}
    context = min(AutoConfig.from_pretrained(path).get_text_config().max_position_embeddings for path in paths)
    max_length = min(config.max_length or context, context)
    streams = []
    for stream, path in (("harmful", config.harmful_data), ("utility", config.utility_data)):
        examples = [] if path is None else encode_file(path, tokenizer, max_length)
        cut = sum(example.truncated for example in examples)
        if verbose and path is not None:
            tokens = sum(example.response_length for example in examples)
            truncated = f", {cut} truncated to {max_length} tokens" if cut else ""
            print(f"{stream}: {len(examples)} rows, {tokens} answer tokens{truncated} ({path})", flush=True)
        streams.append(examples)
    return streams[0], streams[1]


def encode_file(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[EncodedExample]:
    """The conversations of a JSONL file as token ids; an error names the row.

    Raises:
        ValueError: a broken row, or one whose prompt alone fills `max_length`.
    """
    examples = []
    for row, messages in enumerate(read_jsonl(path), start=1):
        try:
            examples.append(encode_example(tokenizer, messages, max_length))
        except ValueError as error:
            raise ValueError(f"{path}, row {row}: {error}") from None
    return examples


def _load_student(config: TrainConfig, args: TrainingArguments, world_size: int) -> PreTrainedModel:
    """The student, after `TrainingArguments` have set up the ranks and, under ZeRO-3, the partitioning."""
    if args.world_size != world_size:
        raise RuntimeError(
            f"the launcher started {world_size} ranks but transformers sees {args.world_size}: every rank would train "
            "on all the data. Check that accelerate and deepspeed are the versions in constraints.txt"
        )
    if config.deepspeed is not None:
        import deepspeed  # slow to import

        # ZeRO-3 partitions the student while it is loaded, and asks DeepSpeed's own group for the number of ranks
        deepspeed.init_distributed(dist_backend=args.ddp_backend)
    # with DeepSpeed the optimizer holds the fp32 copy of bf16 weights; without, the weights themselves are fp32
    dtype = torch.bfloat16 if args.bf16 and config.deepspeed else torch.float32
    student = load_model(config.student or config.aligned, dtype)
    on_gpu = args.device.type != "cpu"
    if config.gradient_checkpointing or (config.gradient_checkpointing is None and on_gpu):
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student


def _step_dataset(
    config: TrainConfig,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    harmful: list[EncodedExample],
    utility: list[EncodedExample],
    models: tuple[PreTrainedModel, ...],
) -> StepDataset:
    vocab_size = min(len(tokenizer), *(logits_width(model) for model in models))
    if config.loss.top_k > vocab_size:
        raise ValueError(f"loss.top_k is {config.loss.top_k} but the vocabulary has {vocab_size} entries")
    random_selection = RandomSelection(config.loss.top_k, vocab_size) if config.selection == "random" else None
    return StepDataset(
        harmful,
        utility,
        harmful_batch_size=config.harmful_batch_size,
        utility_batch_size=config.utility_batch_size,
        max_steps=args.max_steps,
        weights=RowWeights.from_options(
            config.distill_on, config.completion_weight_harmful, config.completion_weight_utility
        ),
        pad_token_id=int(tokenizer.pad_token_id),
        seed=config.seed,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        rank=args.process_index,
        world_size=args.world_size,
        random_selection=random_selection,
    )


def _training_arguments(
    config: TrainConfig, bf16: bool, on_gpu: bool, harmful_rows: int, world_size: int
) -> TrainingArguments:
    rows_per_step = config.harmful_batch_size + config.utility_batch_size
    steps = config.max_steps or -(-int(config.epochs * harmful_rows) // config.harmful_batch_size)
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=max(steps, 1),
        per_device_train_batch_size=rows_per_step // (world_size * config.gradient_accumulation_steps),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=bf16,
        use_cpu=not on_gpu,
        ddp_backend="gloo" if not on_gpu and world_size > 1 else None,
        deepspeed=None if config.deepspeed is None else str(deepspeed_config_path(config.deepspeed)),
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=None,
        report_to=config.report_to,
        remove_unused_columns=False,
        disable_tqdm=False,
    )


# ---- resuming ----


def _run_identity(
    config: TrainConfig, world_size: int, harmful: list[EncodedExample], utility: list[EncodedExample]
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued exactly."""
    settings = {name: value for name, value in config_as_dict(config).items() if name not in FREE_ON_RESUME}
    rows = json.dumps([[(row.input_ids, row.response_start) for row in rows] for rows in (harmful, utility)])
    data = hashlib.sha256(rows.encode()).hexdigest()
    return json.loads(json.dumps({"ranks": world_size, "encoded_data": data, **settings}))


def _checkpoint_to_resume(config: TrainConfig, identity: dict[str, Any]) -> Path | None:
    found = checkpoints(Path(config.output_dir))
    if not found:
        return None
    saved = json.loads((found[-1] / RESUME_FILE).read_text(encoding="utf-8"))
    different = [name for name in identity.keys() | saved.keys() if identity.get(name) != saved.get(name)]
    if different:
        changes = "; ".join(f"{name}: {saved.get(name)!r} -> {identity.get(name)!r}" for name in sorted(different))
        raise ValueError(
            f"{found[-1]} was written by another run and cannot be continued exactly ({changes}); restore these "
            "settings, or give another output_dir"
        )
    return found[-1]


if __name__ == "__main__":
    sys.exit(main())

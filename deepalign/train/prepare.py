"""From a configuration to a trainer that is ready: checks everything, loads everything, in the order ZeRO-3 needs."""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from deepalign.data.chat import EncodedExample, TemplateOptions, encode_example
from deepalign.data.sources import load_conversations
from deepalign.data.steps import RandomSelection, RowWeights, StepDataset, check_batch_size
from deepalign.models import check_same_tokenizer, load_model_config, load_tokenizer, longest_example, set_cpu_threads
from deepalign.train.checks import check_machine, check_output, check_paths, check_schedule, lock_output
from deepalign.train.config import TrainConfig, deepspeed_settings
from deepalign.train.model_card import card_writer
from deepalign.train.resume import checkpoint_to_resume, run_identity
from deepalign.train.students import load_student
from deepalign.train.teacher_models import complete_teachers, load_teacher_models
from deepalign.train.trainer import CompletionTrainer


@dataclass
class Run:
    """A checked training run, ready to start."""

    config: TrainConfig
    trainer: CompletionTrainer
    checkpoint: Path | None


def prepare(config: TrainConfig, held: ExitStack) -> Run:
    """Check everything, load everything; `held` keeps the output folder's lock until the end of the run.

    Raises:
        ValueError, TypeError, FileNotFoundError, RuntimeError: what is wrong and what to do, before any training.
    """
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    check_paths(config)
    check_output(config)
    check_schedule(config)
    check_machine(config, on_gpu, world_size)
    if not on_gpu:
        set_cpu_threads()

    tokenizer = load_common_tokenizer(config)
    harmful, utility = load_streams(config, tokenizer, verbose=rank == 0)
    for stream, size, rows in (
        ("harmful", config.harmful_batch_size, harmful),
        ("utility", config.utility_batch_size, utility),
    ):
        check_batch_size(stream, size, len(rows), world_size, config.gradient_accumulation_steps)
    if rank == 0:
        lock_output(config, held)
    identity = run_identity(config, world_size, harmful, utility)
    checkpoint = checkpoint_to_resume(config, identity)

    bf16 = config.in_bf16(on_gpu)
    # Under ZeRO-3 everything that is loaded after TrainingArguments is partitioned: the teachers come before, to stay
    # whole, and an earlier run in this process must not have left its partitioning on.
    unset_hf_deepspeed_config()
    teacher_models = load_teacher_models(config, torch.bfloat16 if bf16 else torch.float32, tokenizer, harmful, utility)
    args = training_arguments(config, bf16, on_gpu, len(harmful), world_size)
    student = load_student(config, args, world_size)
    teachers = complete_teachers(config, teacher_models, student)
    vocab_size = min(len(tokenizer), teachers.width)
    trainer = CompletionTrainer(
        model=student,
        teachers=teachers,
        args=args,
        train_dataset=step_dataset(
            config,
            tokenizer,
            harmful,
            utility,
            vocab_size=vocab_size,
            max_steps=args.max_steps,
            rank=args.process_index,
            world_size=args.world_size,
        ),
        processing_class=tokenizer,
        loss_config=config.loss,
        loss_form=config.loss_form,
        implementation=config.implementation,
        on_nan=config.on_nan,
        mean_logit_drift=config.mean_logit_drift,
        run_identity=identity,
        save_total_limit=config.save_total_limit,
        card=card_writer(config, world_size, len(harmful), len(utility)),
    )
    check_deepspeed_settings(config, trainer)
    return Run(config, trainer, checkpoint)


def check_deepspeed_settings(config: TrainConfig, trainer: CompletionTrainer) -> None:
    """Refuse a DeepSpeed file that contradicts the configuration, before the training does."""
    if config.deepspeed is None:
        return
    try:
        settings = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
        settings.trainer_config_finalize(trainer.args, trainer.model, trainer.args.max_steps)
    except ValueError as error:
        raise ValueError(f"deepspeed: {config.deepspeed}: {' '.join(str(error).split())}") from None


# ---- what is trained on what ----


def load_common_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the aligned model, after checking that the other models have the same."""
    tokenizer = load_tokenizer(config.aligned)
    for name in ("base", "student"):
        path = getattr(config, name)
        if path is not None and path != config.aligned:
            check_same_tokenizer("aligned", tokenizer, name, load_tokenizer(path))
    return tokenizer


def load_streams(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, verbose: bool
) -> tuple[list[EncodedExample], list[EncodedExample]]:
    """The harmful and the utility examples as token ids, cut to what all models can read."""
    paths = {config.aligned, config.base, config.student or config.aligned}
    max_length = longest_example(config.max_length, *map(load_model_config, paths))
    streams = []
    for stream, path in (("harmful", config.harmful_data), ("utility", config.utility_data)):
        options = config.chat_template_options
        examples = [] if path is None else encode_data(path, tokenizer, max_length, options, announce=verbose)
        cut = sum(example.truncated for example in examples)
        if verbose and path is not None:
            tokens = sum(example.response_length for example in examples)
            truncated = f", {cut} truncated to {max_length} tokens" if cut else ""
            print(f"{stream}: {len(examples)} rows, {tokens} answer tokens{truncated} ({path})", flush=True)
        streams.append(examples)
    return streams[0], streams[1]


def encode_data(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template_options: TemplateOptions | None = None,
    announce: bool = False,
) -> list[EncodedExample]:
    """The conversations that `spec` names (deepalign/data/sources.py) as token ids; an error names the row.

    Raises:
        ValueError: a broken row, or one whose prompt alone fills `max_length`.
        OSError, RuntimeError: data that cannot be read, see `load_data`.
    """
    examples = []
    for row, messages in enumerate(load_conversations(spec, announce=announce), start=1):
        try:
            examples.append(encode_example(tokenizer, messages, max_length, template_options))
        except ValueError as error:
            raise ValueError(f"{spec}, row {row}: {error}") from None
    return examples


def step_dataset(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    harmful: list[EncodedExample],
    utility: list[EncodedExample],
    *,
    vocab_size: int,
    max_steps: int,
    rank: int,
    world_size: int,
) -> StepDataset:
    """The micro-batches of one rank."""
    if config.loss.top_k > vocab_size:
        raise ValueError(f"loss.top_k is {config.loss.top_k} but the vocabulary has {vocab_size} entries")
    random_selection = RandomSelection(config.loss.top_k, vocab_size) if config.selection == "random" else None
    return StepDataset(
        harmful,
        utility,
        harmful_batch_size=config.harmful_batch_size,
        utility_batch_size=config.utility_batch_size,
        max_steps=max_steps,
        weights=RowWeights.from_options(
            config.distill_on, config.completion_weight_harmful, config.completion_weight_utility
        ),
        pad_token_id=int(tokenizer.pad_token_id),
        seed=config.seed,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
        random_selection=random_selection,
        packing=config.packing,
    )


def step_count(config: TrainConfig, harmful_rows: int) -> int:
    """Optimizer steps of the run."""
    return max(1, config.max_steps or -(-int(config.epochs * harmful_rows) // config.harmful_batch_size))


def training_arguments(
    config: TrainConfig, bf16: bool, on_gpu: bool, harmful_rows: int, world_size: int
) -> TrainingArguments:
    """What transformers' Trainer is told. To make them starts the ranks, and ZeRO-3's partitioning of what follows."""
    rows_per_step = config.harmful_batch_size + config.utility_batch_size
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=step_count(config, harmful_rows),
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
        deepspeed=None if config.deepspeed is None else deepspeed_settings(config.deepspeed),
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=None,
        report_to=config.trackers,
        remove_unused_columns=False,
        disable_tqdm=False,
    )

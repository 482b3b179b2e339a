"""CompletionTrainer: a transformers.Trainer whose loss is the completion loss, computed inside the engine's forward.

Nothing divides the loss again: row weights come divided from `StepDataset`, `training_step` hands the loss to the
engine as it is.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from deepalign.data.files import write_text_atomic
from deepalign.data.steps import Batch, StepDataset
from deepalign.kernels.completion_loss import CompletionLossConfig
from deepalign.models import logits_width
from deepalign.train.checkpoints import (
    CARD_FILE,
    METRICS_FILE,
    STAGING,
    UNLOGGED_FILE,
    checkpoint_step,
    checkpoints,
    delete_folder,
    keep_metrics,
    recover,
    replace_folder,
    seal,
)
from deepalign.train.completion_forward import LossForm, attach_completion_loss
from deepalign.train.metrics import DriftWarning, Speed, StepMetrics
from deepalign.train.model_card import CardWriter
from deepalign.train.nonfinite import SKIPPED_FILE, OnNan, StepGuard, TrainingStopped
from deepalign.train.teachers import Teachers


class CompletionTrainer(Trainer):
    """Targeted completion training of one student against two frozen teachers.

    Args:
        model: the student.
        teachers: the two frozen teachers.
        args: `TrainingArguments`; `max_steps`, `gradient_accumulation_steps` and the number of ranks must be those of
            `train_dataset`.
        train_dataset: the rank's micro-batches.
        processing_class: the tokenizer, saved with each checkpoint.
        loss_config, implementation: as for `fused_completion_loss`.
        loss_form: "linear" or "logits", see `attach_completion_loss`.
        on_nan: what happens to a step whose loss or gradient is not finite, see `StepGuard`.
        mean_logit_drift: warn when the student's mean logit is this far from the aligned model's; None: never.
        run_identity: what a checkpoint of this run may be resumed with (see `seal`); plain JSON values.
        save_total_limit: how many checkpoints to keep (0: all).
        card: writes the model card of a step, given its number and the last metrics.

    Checkpoints are written to a staging folder and renamed when whole, so every `checkpoint-N` can be resumed.
    `metrics.jsonl` in the output folder holds one line a log: loss and its two terms, mean alpha, mean base-favored
    count and mean logit per row, gradient norm, learning rate.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        teachers: Teachers,
        args: TrainingArguments,
        train_dataset: StepDataset,
        processing_class: PreTrainedTokenizerBase,
        loss_config: CompletionLossConfig,
        loss_form: LossForm = "linear",
        implementation: str | None = None,
        on_nan: OnNan = "stop",
        mean_logit_drift: float | None = None,
        run_identity: dict[str, Any] | None = None,
        save_total_limit: int = 2,
        card: CardWriter | None = None,
        **trainer_options: Any,
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **trainer_options
        )
        if train_dataset.world_size != args.world_size or train_dataset.rank != args.process_index:
            raise ValueError(
                f"train_dataset was made for rank {train_dataset.rank} of {train_dataset.world_size} but this is rank "
                f"{args.process_index} of {args.world_size}; make it with args.process_index and args.world_size"
            )
        teachers.to(args.device)
        self.run_identity = run_identity or {}
        self.checkpoints_to_keep = save_total_limit
        self.run_dir = Path(str(args.output_dir))
        self.card = card
        self.last_metrics: dict[str, float] = {}
        self._staging = False
        self.metrics = StepMetrics(args.world_size, args.device)
        self.guard = StepGuard(on_nan, train_dataset, self.run_dir)
        self.drift = DriftWarning(mean_logit_drift)
        self.speed = Speed(args.world_size)
        for callback in (self.guard, self.speed, _EndOfStep(self)):
            self.add_callback(callback)
        self.restore_forward = attach_completion_loss(
            model,
            teachers,
            config=loss_config,
            vocab_size=min(logits_width(model), teachers.width, len(processing_class)),
            form=loss_form,
            implementation=implementation,
        )

    # ---- the step ----

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """The rank's micro-batches in order; `StepDataset` has already sharded and shuffled."""
        assert isinstance(self.train_dataset, StepDataset)
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=_only_item)

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch. The loss is already divided over the whole step."""
        model.train()
        self.speed.saw(inputs)
        # Trainer._prepare_inputs would round the row weights to bf16 under DeepSpeed
        batch = {name: self._placed(name, tensor) for name, tensor in inputs.items()}
        loss = self.compute_loss(model, batch)
        if self.accelerator.sync_gradients:
            self.guard.judge_loss()
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        # A clone: on the very tensor that its forward returned, DeepSpeed's ZeRO-0 divides by the accumulation steps
        # all the same (docs/log.md).
        self.accelerator.backward(loss.clone(), **options)
        return loss.detach()

    def _placed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of a batch where it is needed: the numbers that a teacher cache is read by stay on the CPU."""
        return tensor if name == "answer_row" else tensor.to(self.args.device, non_blocking=True)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This rank's loss of one micro-batch: ranks * sum over its rows / weight sum of the whole step, per term."""
        outputs = model(**inputs)
        self.metrics.add(outputs["sums"])
        self.guard.saw(inputs, outputs["bad_rows"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    # ---- metrics ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the per-term metrics to a training log and append it to `metrics.jsonl`."""
        if "loss" in logs:
            logs.update(self.metrics.drain())
            logs["harmful_epoch"] = self._harmful_epoch()
            if self.guard.skipped_steps:
                logs["skipped_steps"] = self.guard.skipped_steps
                self.guard.skipped_steps = 0
            logs = {name: value for name, value in logs.items() if math.isfinite(value)}
            self.last_metrics = dict(logs)
            if self.is_world_process_zero():
                self._write_metrics(logs)
        super().log(logs, start_time)

    def _write_metrics(self, logs: dict[str, float]) -> None:
        line = json.dumps({"step": self.state.global_step, **logs}) + "\n"
        try:
            with open(self.run_dir / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise self.cannot_write(METRICS_FILE, error) from error
        warning = self.drift.message(logs)
        if warning is not None:
            print(f"warning: step {self.state.global_step}: {warning}", flush=True)

    def _harmful_epoch(self) -> float:
        dataset = self.train_dataset
        assert isinstance(dataset, StepDataset)
        return self.state.global_step * dataset.batch_sizes[0] / len(dataset.streams[0])

    # ---- checkpoints ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint folder (True: the last one in the output folder).

        Metrics of steps after that checkpoint are dropped first: they will be written again.

        Raises:
            TrainingStopped: a step is not finite and `on_nan` is "stop", or something cannot be written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checkpoints(self.run_dir)[-1])
        first_step = 0
        if resume_from_checkpoint:
            first_step = checkpoint_step(Path(resume_from_checkpoint))
            self._restore_unlogged(Path(resume_from_checkpoint) / UNLOGGED_FILE)
        try:
            self._on_main_process(lambda: self._tidy(first_step))
        except OSError as error:
            raise self.cannot_write(METRICS_FILE, error) from error
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _tidy(self, first_step: int) -> None:
        """Put in order what an interrupted run left."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        recover(self.run_dir)
        for name in (METRICS_FILE, SKIPPED_FILE):
            keep_metrics(self.run_dir / name, first_step)

    def _restore_unlogged(self, path: Path) -> None:
        if path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            self.guard.skipped_steps = state.pop("skipped_steps")
            self.metrics.restore(state, self.args.process_index)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run_dir / STAGING if self._staging else self.run_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._on_main_process(lambda: shutil.rmtree(self.run_dir / STAGING, ignore_errors=True))
        unlogged = self.metrics.state() | {"skipped_steps": self.guard.skipped_steps}
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            self._barrier()
            self._on_main_process(lambda: self._publish(name, unlogged))
        except Exception as error:  # torch, safetensors and DeepSpeed each raise their own
            shutil.rmtree(self.run_dir / STAGING, ignore_errors=True)
            raise self.cannot_write(name, error) from error
        finally:
            self._staging = False

    def _publish(self, name: str, unlogged: dict[str, Any]) -> None:
        """Rename a whole checkpoint to its place, then delete the ones that are too old."""
        staged = self.run_dir / STAGING / name
        write_text_atomic(staged / UNLOGGED_FILE, json.dumps(unlogged) + "\n")
        self._write_card(staged)
        seal(staged, self.run_identity)
        replace_folder(staged, self.run_dir / name)
        shutil.rmtree(self.run_dir / STAGING, ignore_errors=True)
        if self.checkpoints_to_keep > 0:
            for old in checkpoints(self.run_dir)[: -self.checkpoints_to_keep]:
                delete_folder(old)

    def save_final(self, folder: Path) -> None:
        """Write the trained student and its tokenizer as a folder that `from_pretrained` loads, whole or not at all."""
        staging = folder.with_name(f".{folder.name}.incomplete")
        self._on_main_process(lambda: shutil.rmtree(staging, ignore_errors=True))
        try:
            self.save_model(str(staging), _internal_call=True)
            self._barrier()
            self._on_main_process(lambda: self._write_card(staging))
            self._on_main_process(lambda: replace_folder(staging, folder))
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise self.cannot_write(folder.name, error) from error

    def _write_card(self, folder: Path) -> None:
        if self.card is not None:
            write_text_atomic(folder / CARD_FILE, self.card(self.state.global_step, self.last_metrics))

    def cannot_write(self, what: str, error: Exception) -> TrainingStopped:
        """What is lost when `what` could not be written: nothing that was whole."""
        found = checkpoints(self.run_dir)
        kept = f"the last whole checkpoint is {found[-1].name}" if found else "there is no checkpoint yet"
        reason = " ".join(str(error).split())
        return TrainingStopped(
            f"step {self.state.global_step}: {what} could not be written to {self.run_dir} ({reason}); {kept}. Once "
            "the cause is gone (a full disk, a rank that died), start the same command again"
        )

    def _on_main_process(self, action: Callable[[], object]) -> None:
        if self.is_world_process_zero():
            action()
        self._barrier()

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


class _EndOfStep(TrainerCallback):
    """Counts a step's metrics once it is known whether it was taken."""

    def __init__(self, trainer: CompletionTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.metrics.end_step(taken=not self.trainer.guard.skipped)


def _only_item(items: list[Batch]) -> Batch:
    assert len(items) == 1
    return items[0]

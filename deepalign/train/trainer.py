"""CompletionTrainer: a transformers.Trainer whose loss is the completion loss, computed inside the engine's forward.

Under ZeRO-3 a parameter exists only while the module that owns it runs, so the loss has to be part of the wrapped
model's forward. `attach_completion_loss` puts it there: the student's own forward is replaced, on that one instance, by
one that returns the loss and its statistics. The two frozen teachers run beside it, without gradients.

Nothing divides the loss again: row weights come divided from `StepDataset`, `training_step` hands the loss to the
engine as it is.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from deepalign.data.files import write_text_atomic
from deepalign.data.steps import Batch, StepDataset
from deepalign.kernels.completion_loss import CompletionLossConfig, fused_completion_loss
from deepalign.models import logits_width

METRICS_FILE = "metrics.jsonl"
RESUME_FILE = "resume.json"
STAGING = ".incomplete"

# Sums over this rank's rows since the last log, in this order.
_SUMS = ("kl", "completion", "alpha", "base_favored_count", "mean_logit", "rows")


def attach_completion_loss(
    model: PreTrainedModel,
    *,
    config: CompletionLossConfig,
    vocab_size: int,
    implementation: str | None = None,
) -> Callable[[], None]:
    """Replace `model.forward`, on this instance, by one that returns the completion loss.

    The new forward takes a `StepDataset` batch and the teachers' logits at the batch's R rows, (R, V), and returns
    {"loss": scalar, "sums": (6,) statistics summed over the rows, see `_SUMS`}.

    Args:
        model: the student.
        config, implementation: as for `fused_completion_loss`.
        vocab_size: number of real vocabulary entries; padding entries beyond are ignored.

    Returns:
        A function that gives the model its own forward back.
    """
    model_forward = model.forward

    def completion_forward(
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        row_index: torch.Tensor,
        aligned_logits: torch.Tensor,
        base_logits: torch.Tensor,
        kl_weight: torch.Tensor,
        completion_weight: torch.Tensor,
        top_k_indices: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        logits = model_forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        student_RV = rows_of(logits, row_index, aligned_logits.shape[-1])
        dtype = torch.promote_types(student_RV.dtype, aligned_logits.dtype)
        output = fused_completion_loss(
            student_RV.to(dtype),
            aligned_logits.to(dtype),
            base_logits.to(dtype),
            kl_weight=kl_weight,
            completion_weight=completion_weight,
            top_k_indices=top_k_indices,
            config=config,
            vocab_size=vocab_size,
            reduction="sum",
            implementation=implementation,
        )
        mean_logit_R = student_RV.detach()[:, :vocab_size].mean(dim=-1, dtype=torch.float32)
        sums = (
            (kl_weight * output.kl).sum(),
            (completion_weight * output.alpha * output.completion).sum(),
            output.alpha.sum(),
            output.base_favored_count.sum(),
            mean_logit_R.sum(),
            torch.full((), row_index.numel(), device=row_index.device),
        )
        return {"loss": output.loss, "sums": torch.stack([value.to(torch.float64) for value in sums])}

    model.forward = completion_forward

    def restore() -> None:
        model.forward = model_forward

    return restore


def rows_of(logits_BTV: torch.Tensor, row_index: torch.Tensor, width: int) -> torch.Tensor:
    """The R rows (token positions) that carry a weight, (R, width): prompts and padding go no further."""
    return logits_BTV.flatten(0, 1).index_select(0, row_index)[:, :width]


class CompletionTrainer(Trainer):
    """Targeted completion training of one student against two frozen teachers.

    Args:
        model: the student.
        aligned, base: frozen teachers, whole on every rank.
        args: `TrainingArguments`; `max_steps`, `gradient_accumulation_steps` and the number of ranks must be those of
            `train_dataset`.
        train_dataset: the rank's micro-batches.
        processing_class: the tokenizer, saved with each checkpoint.
        loss_config, implementation: as for `fused_completion_loss`.
        run_identity: what a checkpoint of this run may be resumed with (see `resume_file`); plain JSON values.
        save_total_limit: how many checkpoints to keep (0: all).

    Checkpoints are written to a staging folder and renamed when whole, so every `checkpoint-N` can be resumed.
    `metrics.jsonl` in the output folder holds one line a log: loss and its two terms, mean alpha, mean base-favored
    count and mean logit per row, gradient norm, learning rate.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        aligned: PreTrainedModel,
        base: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: StepDataset,
        processing_class: PreTrainedTokenizerBase,
        loss_config: CompletionLossConfig,
        implementation: str | None = None,
        run_identity: dict[str, Any] | None = None,
        save_total_limit: int = 2,
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
        self.aligned = _on_device(aligned, args.device)
        self.base = _on_device(base, args.device)
        self.width = min(logits_width(model), logits_width(aligned), logits_width(base))
        self.run_identity = run_identity or {}
        self.checkpoints_to_keep = save_total_limit
        self.run_dir = Path(str(args.output_dir))
        self._logged_step = 0
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=args.device)
        self._staging = False
        self.restore_forward = attach_completion_loss(
            model,
            config=loss_config,
            vocab_size=min(self.width, len(processing_class)),
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
        # Trainer._prepare_inputs would round the row weights to bf16 under DeepSpeed
        batch = {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in inputs.items()}
        loss = self.compute_loss(model, batch)
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)
        return loss.detach()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This rank's loss of one micro-batch: ranks * sum over its rows / weight sum of the whole step, per term."""
        outputs = model(
            **inputs,
            aligned_logits=self._teacher_rows(self.aligned, inputs),
            base_logits=self._teacher_rows(self.base, inputs),
        )
        self._sums += outputs["sums"]
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    @torch.no_grad()
    def _teacher_rows(self, teacher: PreTrainedModel, batch: Batch) -> torch.Tensor:
        logits = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return rows_of(logits, batch["row_index"], self.width)

    # ---- metrics ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the per-term metrics to a training log and append it to `metrics.jsonl`."""
        if "loss" in logs:
            logs.update(self._drain_sums())
            logs["harmful_epoch"] = self._harmful_epoch()
            if self.is_world_process_zero():
                with open(self.run_dir / METRICS_FILE, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")
        super().log(logs, start_time)

    def _drain_sums(self) -> dict[str, float]:
        """Metrics over the steps since the last log, all ranks."""
        sums = self._sums
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        totals = dict(zip(_SUMS, sums.tolist(), strict=True))
        steps = self.state.global_step - self._logged_step
        self._logged_step = self.state.global_step
        self._sums = torch.zeros_like(sums)
        rows = max(totals.pop("rows"), 1.0)
        # the two terms carry weights that are divided per step and multiplied by the number of ranks
        terms = {name: totals.pop(name) / (steps * self.args.world_size) for name in ("kl", "completion")}
        return {**terms, **{name: total / rows for name, total in totals.items()}}

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
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checkpoints(self.run_dir)[-1])
        self._logged_step = checkpoint_step(Path(resume_from_checkpoint)) if resume_from_checkpoint else 0
        if self.is_world_process_zero():
            self.run_dir.mkdir(parents=True, exist_ok=True)
            _keep_metrics(self.run_dir / METRICS_FILE, self._logged_step)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run_dir / STAGING if self._staging else self.run_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._on_main_process(lambda: shutil.rmtree(self.run_dir / STAGING, ignore_errors=True))
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self._barrier()
        self._on_main_process(lambda: self._publish(name))

    def _publish(self, name: str) -> None:
        """Rename a whole checkpoint to its place, then delete the ones that are too old."""
        write_text_atomic(self.run_dir / STAGING / name / RESUME_FILE, json.dumps(self.run_identity, indent=2))
        _replace_folder(self.run_dir / STAGING / name, self.run_dir / name)
        shutil.rmtree(self.run_dir / STAGING, ignore_errors=True)
        if self.checkpoints_to_keep > 0:
            for old in checkpoints(self.run_dir)[: -self.checkpoints_to_keep]:
                _delete_folder(old)

    def save_final(self, folder: Path) -> None:
        """Write the trained student and its tokenizer as a folder that `from_pretrained` loads, whole or not at all."""
        staging = folder.with_name(f".{folder.name}.incomplete")
        self._on_main_process(lambda: shutil.rmtree(staging, ignore_errors=True))
        self.save_model(str(staging), _internal_call=True)
        self._barrier()
        self._on_main_process(lambda: _replace_folder(staging, folder))

    def _on_main_process(self, action: Callable[[], None]) -> None:
        if self.is_world_process_zero():
            action()
        self._barrier()

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


def _on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    torch.nn.Module.to(model, device)
    return model


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was written after."""
    return int(checkpoint.name.split("-")[-1])


def _only_item(items: list[Batch]) -> Batch:
    assert len(items) == 1
    return items[0]


def _keep_metrics(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step`: the resumed run writes them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _is_json(line) and json.loads(line)["step"] <= last_step]
        write_text_atomic(path, "".join(line + "\n" for line in kept))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:  # a line cut off by a kill
        return False
    return True


def _replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, which may exist."""
    old = _set_aside(folder) if folder.exists() else None
    os.replace(new, folder)
    if old is not None:
        shutil.rmtree(old)


def _delete_folder(folder: Path) -> None:
    """Delete a folder so that an interruption leaves no half of it under its name."""
    shutil.rmtree(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return aside

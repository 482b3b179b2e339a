"""The two frozen teachers, aligned and base, as the trainer sees them: two heads, and hidden states at a batch's rows.

The loss needs a teacher's last hidden states at the rows that carry a weight, and its head. Where the hidden states
come from is the only difference between the kinds of teachers:

    OnlineTeachers    two whole models on every rank, run on every batch
    AdapterTeachers   the base model as above; the aligned one is the student with its adapters off (LoRA that starts
                      from the aligned model), so there is no third model in memory
    CachedTeachers    hidden states written once before training (deepalign/train/teacher_cache.py)
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepalign.data.steps import Batch
from deepalign.models import logits_width
from deepalign.output_head import OutputHead, hidden_states, output_head

# What of a batch a decoder is called with, where the batch has it.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class Teachers(ABC):
    """Two frozen teachers. Everything is called inside the student's forward, where ZeRO-3 has its weights gathered."""

    @property
    @abstractmethod
    def aligned_head(self) -> OutputHead:
        """The aligned model's head, on the device of the batches."""

    @property
    @abstractmethod
    def base_head(self) -> OutputHead:
        """The base model's head, on the device of the batches."""

    @abstractmethod
    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Last hidden states at the batch's R weighted rows.

        Args:
            batch: of `StepDataset`: `row_index` (R,) says where the rows are in the B*T positions, `answer_row` (R,)
                which answer token of the data each row predicts.

        Returns:
            (aligned_RH, base_RH), without gradient, each in the dtype of its head and with its own H.
        """

    @property
    def width(self) -> int:
        """Entries that both teachers' logits have, padding included."""
        return min(self.aligned_head.lm_head.shape[0], self.base_head.lm_head.shape[0])

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits at the batch's rows, (aligned_RV, base_RV), without gradient; V is each model's own width."""
        aligned_RH, base_RH = self.hidden(batch)
        with torch.no_grad():
            return self.aligned_head.logits(aligned_RH), self.base_head.logits(base_RH)

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move what the teachers hold to the device of the batches."""


class OnlineTeachers(Teachers):
    """Two whole frozen models on every rank."""

    def __init__(self, aligned: PreTrainedModel, base: PreTrainedModel) -> None:
        self.aligned, self.base = aligned, base

    @property
    def width(self) -> int:
        """Asked of the models, not of their heads: the logits form takes heads that `OutputHead` does not describe."""
        return min(logits_width(self.aligned), logits_width(self.base))

    @property
    def aligned_head(self) -> OutputHead:
        """The head of the aligned model."""
        return output_head(self.aligned)

    @property
    def base_head(self) -> OutputHead:
        """The head of the base model."""
        return output_head(self.base)

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run both models."""
        return hidden_rows(self.aligned, batch), hidden_rows(self.base, batch)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The models' own logits: right for families whose head `OutputHead` does not describe, too."""
        return logits_rows(self.aligned, batch), logits_rows(self.base, batch)

    def to(self, device: torch.device) -> None:
        """Move both models."""
        for model in (self.aligned, self.base):
            move_model(model, device)


class AdapterTeachers(Teachers):
    """The aligned model is the student without its adapters; the base model is whole on every rank.

    Args:
        student: a peft model around the aligned model, as it is trained.
        base: the frozen base model.
    """

    def __init__(self, student: PreTrainedModel, base: PreTrainedModel) -> None:
        self.student, self.base = student, base

    @property
    def width(self) -> int:
        """Asked outside the forward too, where ZeRO-3 has the student's weights partitioned."""
        return min(logits_width(self.student), logits_width(self.base))

    @property
    def aligned_head(self) -> OutputHead:
        """The student's head without its adapter."""
        with self.student.disable_adapter():  # type: ignore[operator]
            head = output_head(self.student)
        return OutputHead(head.lm_head.detach(), head.logit_softcap, head.logit_scale)

    @property
    def base_head(self) -> OutputHead:
        """The head of the base model."""
        return output_head(self.base)

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the student with its adapters off and in evaluation mode, then the base model."""
        with self._without_adapters():
            aligned_RH = hidden_rows(self.student, batch)
        return aligned_RH, hidden_rows(self.base, batch)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The models' own logits, as `OnlineTeachers`."""
        with self._without_adapters():
            # the model inside peft's wrapper: in training the wrapper's forward is the loss
            aligned_RV = logits_rows(self.student.get_base_model(), batch)  # type: ignore[operator]
        return aligned_RV, logits_rows(self.base, batch)

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        mode = self.student.training
        self.student.eval()
        try:
            with self.student.disable_adapter():  # type: ignore[operator]
                yield
        finally:
            self.student.train(mode)

    def to(self, device: torch.device) -> None:
        """Move the base model; the student belongs to the trainer."""
        move_model(self.base, device)


def model_inputs(batch: Batch) -> Batch:
    """The part of a batch that a decoder is called with."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def rows_of(values_BTX: Tensor, row_index: Tensor) -> Tensor:
    """The R rows (token positions) that carry a weight, (R, X): prompts and padding go no further."""
    return values_BTX.flatten(0, 1).index_select(0, row_index)


@torch.no_grad()
def hidden_rows(model: nn.Module, batch: Batch) -> Tensor:
    """A frozen model's last hidden states (R, H) at the rows of a batch."""
    return rows_of(hidden_states(model, **model_inputs(batch)), batch["row_index"])


@torch.no_grad()
def logits_rows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """A frozen model's own logits (R, V) at the rows of a batch."""
    return rows_of(model(**model_inputs(batch), use_cache=False).logits, batch["row_index"])


def move_model(model: PreTrainedModel, device: torch.device) -> None:
    """Move a frozen model, unless it is quantised."""
    if getattr(model, "quantization_method", None) is None:  # a quantised model is loaded where it stays
        nn.Module.to(model, device)

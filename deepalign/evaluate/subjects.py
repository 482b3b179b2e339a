"""What is evaluated: a model, and how it is decoded.

The model is a folder or a hub id, or a PEFT adapter on one; with a base model and alpha > 0 it is decoded contrastively
(Eq. 7).
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.resumable import model_fingerprint
from deepalign.evaluate.generation import Contrast
from deepalign.kernels.contrastive_sample import Space
from deepalign.models import (
    DTYPES,
    check_model_path,
    check_same_tokenizer,
    choose_device,
    default_dtype,
    load_adapter,
    load_adapter_config,
    load_frozen_model,
    load_tokenizer,
)


@dataclass(frozen=True)
class Subject:
    """A model and its decoding.

    Attributes:
        name: as reports call it.
        model: folder or hub id.
        base: of its base model, for contrastive decoding.
        alpha, space: of contrastive decoding; 0: the model alone.
        adapter: folder of a PEFT adapter to merge into `model`.
        dtype: float32, bfloat16 or float16; None: bfloat16 on a GPU, float32 on a CPU.
        device: None: cuda if there is one, else cpu.

    Raises:
        ValueError: alpha below 0 or not finite, or > 0 without a base model, or an unknown dtype.
    """

    name: str
    model: str
    base: str | None = None
    alpha: float = 0.0
    space: Space = "logits"
    adapter: str | None = None
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"{self.name}: alpha is {self.alpha}; expected a finite number >= 0")
        if self.alpha > 0 and self.base is None:
            raise ValueError(f"{self.name}: alpha is {self.alpha} but there is no base model to contrast with; give it")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"{self.name}: dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")

    def fingerprint(self) -> dict[str, Any]:
        """What decides the subject's answers: contents, not names."""
        contrast = [model_fingerprint(str(self.base)), self.alpha, self.space] if self.alpha > 0 else None
        adapter = None if self.adapter is None else model_fingerprint(self.adapter)
        model = model_fingerprint(self.model)
        return {"model": model, "adapter": adapter, "contrast": contrast, "dtype": self.dtype_name}

    @property
    def dtype_name(self) -> str:
        """The name in `DTYPES` that it is loaded in."""
        return self.dtype or default_dtype(choose_device("device", self.device))

    def check(self) -> None:
        """Refuse folders and devices that are not there, before anything is loaded.

        Raises:
            OSError, ValueError: which one.
        """
        choose_device("device", self.device)
        check_model_path(f"{self.name}: model", self.model)
        if self.alpha > 0:
            check_model_path(f"{self.name}: base", str(self.base))
        if self.adapter is not None:
            load_adapter_config(self.adapter)


@dataclass(frozen=True)
class LoadedSubject:
    """A subject in memory, in evaluation mode."""

    subject: Subject
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    contrast: Contrast | None = field(default=None)


@contextlib.contextmanager
def load_subject(subject: Subject) -> Iterator[LoadedSubject]:
    """Load a subject for the duration of the block; its memory is given back afterwards.

    Raises:
        OSError: a model or an adapter that is not there.
        ValueError: no such device, or tokenizers of model and base that differ.
    """
    subject.check()
    device = choose_device("device", subject.device)
    dtype = DTYPES[subject.dtype_name]
    tokenizer = load_tokenizer(subject.model)
    model = load_frozen_model(subject.model, dtype)
    if subject.adapter is not None:
        model = load_adapter(model, subject.adapter).merge_and_unload().eval()
    torch.nn.Module.to(model, device)
    contrast = None
    if subject.alpha > 0:
        check_same_tokenizer(subject.name, tokenizer, "its base model", load_tokenizer(str(subject.base)))
        base = load_frozen_model(str(subject.base), dtype)
        torch.nn.Module.to(base, device)
        contrast = Contrast(base, subject.alpha, subject.space)
    yield LoadedSubject(subject, model, tokenizer, contrast)
    del model, contrast
    if device.type == "cuda":
        torch.cuda.empty_cache()

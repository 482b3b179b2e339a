"""Loading the teachers that a configuration asks for.

In two parts, because of ZeRO-3: whole models are loaded before the ranks' partitioning is set up, and the student,
which may serve as the aligned teacher, after it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import EncodedExample
from deepalign.models import load_frozen_model
from deepalign.output_head import check_output_head, logit_transform
from deepalign.train.cached_teachers import CachedTeachers
from deepalign.train.config import TrainConfig
from deepalign.train.teacher_fingerprint import teacher_fingerprint
from deepalign.train.teachers import AdapterTeachers, OnlineTeachers, Teachers

TeacherModels = Teachers | PreTrainedModel  # complete teachers, or the base model, to be completed by the student


def student_is_aligned(config: TrainConfig) -> bool:
    """Whether the student without its adapter is the aligned model, which then need not be loaded."""
    return config.lora is not None and config.student in (None, config.aligned)


def load_teacher_models(
    config: TrainConfig,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[EncodedExample],
    utility: Sequence[EncodedExample],
) -> TeacherModels:
    """What of the teachers is loaded before the student.

    Raises:
        ValueError: a family whose head the linear loss does not know, or a teacher cache that is not whole or was
            made for something else.
        FileNotFoundError: no teacher cache where the configuration says.
    """
    if config.teacher == "cache":
        return CachedTeachers.open(
            Path(str(config.teacher_cache)),
            cache_fingerprint(config, dtype, tokenizer, harmful, utility),
            {"aligned": config.aligned, "base": config.base},
            dtype,
            progress=int(os.environ.get("LOCAL_RANK", 0)) == 0,
        )
    base = _load(config, config.base, dtype)
    return base if student_is_aligned(config) else OnlineTeachers(_load(config, config.aligned, dtype), base)


def complete_teachers(config: TrainConfig, loaded: TeacherModels, student: PreTrainedModel) -> Teachers:
    """The teachers, now that the student is there."""
    teachers = loaded if isinstance(loaded, Teachers) else AdapterTeachers(student, loaded)
    if config.loss_form == "linear":
        _check_one_family(student, teachers)
    return teachers


def cache_fingerprint(
    config: TrainConfig,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[EncodedExample],
    utility: Sequence[EncodedExample],
) -> dict[str, Any]:
    """What a teacher cache for this training depends on; reads all weight files of both teachers once."""
    return teacher_fingerprint(
        teachers={"aligned": config.aligned, "base": config.base},
        tokenizer=tokenizer,
        streams={"harmful": harmful, "utility": utility},
        max_length=config.max_length,
        compute_dtype=dtype,
        quantization=config.teacher_quantization,
    )


def _load(config: TrainConfig, path: str, dtype: torch.dtype) -> PreTrainedModel:
    model = load_frozen_model(path, dtype, quantization_options(config.teacher_quantization, dtype))
    if config.loss_form == "linear":
        try:
            check_output_head(model)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}; loss_form: logits trains by the models' own logits") from error
    return model


def quantization_options(kind: str | None, dtype: torch.dtype) -> dict[str, object]:
    """Options of `from_pretrained` for a model in 4 or 8 bits on this rank's GPU; the head stays as it is."""
    if kind is None:
        return {}
    if kind == "8bit":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": settings, "device_map": {"": int(os.environ.get("LOCAL_RANK", 0))}}


def _check_one_family(student: PreTrainedModel, teachers: Teachers) -> None:
    """The linear loss makes logits of three hidden states in one way."""
    expected = logit_transform(student)
    heads = {"base": teachers.base_head}
    if not isinstance(teachers, AdapterTeachers):
        heads["aligned"] = teachers.aligned_head
    for name, head in heads.items():
        found = (head.logit_softcap, head.logit_scale)
        if found != expected:
            raise ValueError(
                f"the {name} model's logits have softcap and scale {found}, the student's {expected}; the linear loss "
                "needs one family of models: use loss_form: logits"
            )

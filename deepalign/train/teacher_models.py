"""Loading the teachers that a configuration asks for.

In two parts, because of ZeRO-3: whole models are loaded before the ranks' partitioning is set up, and the student,
which may serve as the aligned teacher, after it.
"""

import os
from collections.abc import Sequence

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import EncodedExample
from deepalign.models import load_frozen_model
from deepalign.output_head import check_output_head, logit_transform
from deepalign.train.config import TrainConfig
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
        ValueError: a family whose head the linear loss does not know.
    """
    if config.teacher == "cache":
        raise ValueError("teacher: cache is not available in this version; use teacher: online")
    base = _load(config, config.base, dtype)
    return base if student_is_aligned(config) else OnlineTeachers(_load(config, config.aligned, dtype), base)


def complete_teachers(config: TrainConfig, loaded: TeacherModels, student: PreTrainedModel) -> Teachers:
    """The teachers, now that the student is there."""
    teachers = loaded if isinstance(loaded, Teachers) else AdapterTeachers(student, loaded)
    if config.loss_form == "linear":
        _check_one_family(student, teachers)
    return teachers


def _load(config: TrainConfig, path: str, dtype: torch.dtype) -> PreTrainedModel:
    model = load_frozen_model(path, dtype, quantization_options(config.teacher_quantization, dtype))
    if config.loss_form == "linear":
        check_output_head(model)
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

"""What a configuration says about its teachers and their data: the same for training and for `cache-teacher`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from deepalign.data.chat import EncodedExample
from deepalign.train.config import TrainConfig
from deepalign.train.teacher_fingerprint import teacher_fingerprint


@dataclass(frozen=True)
class TeacherInputs:
    """Everything that hidden states of the teachers depend on, loaded but for the models.

    Attributes:
        paths: "aligned" and "base": folders or hub ids.
        tokenizer: of both.
        streams: "harmful" and "utility": encoded examples.
        max_length: tokens an example is cut to.
        dtype: in which the teachers run.
        device: "cuda" or "cpu".
        quantization: of the teachers.
    """

    paths: dict[str, str]
    tokenizer: PreTrainedTokenizerBase
    streams: Mapping[str, Sequence[EncodedExample]]
    max_length: int
    dtype: torch.dtype
    device: str
    quantization: str | None

    def fingerprint(self) -> dict[str, Any]:
        """As a cache stores it; reads all weight files once. See `teacher_fingerprint`."""
        return teacher_fingerprint(
            teachers=self.paths,
            tokenizer=self.tokenizer,
            streams=self.streams,
            max_length=self.max_length,
            compute_dtype=self.dtype,
            quantization=self.quantization,
        )


def teacher_inputs(config: TrainConfig, verbose: bool = True) -> TeacherInputs:
    """Check paths, read tokenizer and data of a configuration.

    Raises:
        ValueError, FileNotFoundError: as for a training with this configuration.
    """
    from deepalign.train import run

    run._check_paths(config)
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    bf16 = on_gpu if config.bf16 is None else config.bf16
    tokenizer = run._load_common_tokenizer(config)
    harmful, utility = run._load_streams(config, tokenizer, verbose=verbose)
    return TeacherInputs(
        paths={"aligned": config.aligned, "base": config.base},
        tokenizer=tokenizer,
        streams={"harmful": harmful, "utility": utility},
        max_length=config.max_length or 0,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        device="cuda" if on_gpu else "cpu",
        quantization=config.teacher_quantization,
    )

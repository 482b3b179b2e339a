"""What a run will need, before anything is loaded: memory per rank and time per step, from configurations alone.

Memory is a sum of parts (`memory_parts`) that each follow from a rule: who holds weights, gradients and optimizer
states in which precision and which share of them (DeepSpeed's ZeRO stages), what autograd keeps (counted,
`activations.py`), what the loss holds (`docs/linear-loss.md`). The peak is the largest of three moments: the start of
the backward, its last layer (when the gradients have taken the activations' place), the optimizer step. Time is
products of matrices divided by a rate that is given or measured; communication is left out, its volume is stated. How
far measured runs are from this: docs/training-launch.md.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from deepalign.kernels.completion_loss.linear import chunk_buffers
from deepalign.kernels.linear_rows import choose_chunk_rows
from deepalign.train.activations import activation_bytes, meta_model
from deepalign.train.adapter_targets import default_targets
from deepalign.train.config import LoraConfig

GIB = 2**30
# DeepSpeed: stage3_max_live_parameters' default, and the presets' reduce_bucket_size
MAX_LIVE_PARAMETERS = 1_000_000_000
REDUCE_BUCKET = 50_000_000
Zero = Literal["none", "zero0", "zero1", "zero2", "zero3"]  # "none": without DeepSpeed


@dataclass(frozen=True)
class ModelSize:
    """Numbers of entries: all weights, those trained, the head; and of the decoder's matrices, which cost products."""

    parameters: int
    trainable: int
    head: int
    matrices: int
    head_is_trained: bool

    @classmethod
    def of(cls, config: PreTrainedConfig, lora: LoraConfig | None = None) -> "ModelSize":
        """Count a model's weights, with the adapters of `lora` where it is given."""
        model = meta_model(config)
        head = model.get_output_embeddings()
        matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        frozen = sum(parameter.numel() for parameter in model.parameters())
        trainable = frozen if lora is None else _adapter_parameters(model, lora)
        return cls(
            parameters=frozen if lora is None else frozen + trainable,
            trainable=trainable,
            head=head.weight.numel(),
            matrices=matrices,
            head_is_trained=lora is None or lora.train_lm_head,
        )


@dataclass(frozen=True)
class Load:
    """One rank's micro-batch at its largest: `rows` of `tokens` tokens, `weighted` of them read by the loss."""

    rows: int
    tokens: int
    weighted: int
    packed: bool = False


@dataclass(frozen=True)
class Setup:
    """How a run is spread and in which precision. `teachers`: whole online models, or the heads of cached ones."""

    zero: Zero
    ranks: int = 1
    bf16: bool = True
    on_gpu: bool = True
    checkpointing: bool = True
    teachers: int = 2
    teachers_cached: bool = False
    accumulation: int = 1
    loss_form: Literal["linear", "logits"] = "linear"

    @property
    def stage(self) -> int:
        """The ZeRO stage; 0 without DeepSpeed too."""
        return 0 if self.zero == "none" else int(self.zero[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and teachers. Without DeepSpeed the student's own weights stay fp32 (`weight_bytes`)."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def weight_bytes(self) -> int:
        """Of one of the student's weights."""
        return 4 if self.zero == "none" else self.dtype.itemsize


def memory_parts(config: PreTrainedConfig, size: ModelSize, setup: Setup, load: Load) -> dict[str, int]:
    """Bytes on one rank, by part; "peak" is what they come to at the worst of the three moments.

    Args:
        config: of the student (the teachers are taken to be of its size).
        size: its entries, see `ModelSize.of`.
        setup: how the run is spread.
        load: the largest micro-batch.
    """
    sharded = {name: setup.ranks if setup.stage >= stage else 1 for name, stage in _SHARDED_FROM.items()}
    width = setup.weight_bytes
    kept, last = activation_bytes(
        config, load.rows, load.tokens, setup.dtype, checkpointing=setup.checkpointing, packed=load.packed
    )
    parts = {
        "weights": size.parameters * width // sharded["weights"],
        "gathered": min(size.parameters, MAX_LIVE_PARAMETERS) * width if setup.stage == 3 else 0,
        "cast": size.parameters * 2 if setup.zero == "none" and setup.bf16 else 0,
        "gradients": size.trainable * width // sharded["gradients"],
        "optimizer": size.trainable * _optimizer_bytes(setup) // sharded["optimizer"],
        "teachers": setup.teachers * (size.head if setup.teachers_cached else _whole(size)) * setup.dtype.itemsize,
        "activations": kept,
        "loss": loss_bytes(config, size, setup, load),
        "buckets": _bucket_entries(size, setup) * width,
        "step": size.trainable * _step_bytes(setup) // sharded["optimizer"],
    }
    held = parts["weights"] + parts["optimizer"] + parts["teachers"]
    passing = parts["gathered"] + parts["cast"] + parts["buckets"]
    # a CPU's pages are taken when they are written to: stages 1 and 2 make their buckets anew in every backward
    unwritten = parts["buckets"] if setup.stage in (1, 2) and not setup.on_gpu else 0
    # ZeRO-3 keeps a buffer for them; otherwise they are there before a backward only from an earlier micro-batch
    before = parts["gradients"] if setup.stage == 3 or setup.accumulation > 1 else 0
    start = before + kept + parts["loss"] + passing - unwritten
    end = parts["gradients"] + last + passing
    return parts | {"peak": held + max(start, end, parts["gradients"] + parts["step"])}


_SHARDED_FROM = {"optimizer": 1, "gradients": 2, "weights": 3}


def _optimizer_bytes(setup: Setup) -> int:
    """Adam's two moments, and the fp32 copy of the weights that ZeRO (and bf16 under DeepSpeed) works on."""
    has_copy = setup.stage >= 1 or (setup.zero == "zero0" and setup.bf16)
    return 8 + 4 * has_copy + (4 if setup.zero == "zero0" and setup.bf16 else 0)


def _bucket_entries(size: ModelSize, setup: Setup) -> int:
    """Where gradients are collected to be reduced: one bucket under ZeRO-3, two in turn under stages 1 and 2."""
    if setup.stage == 0:
        return 0
    if not setup.on_gpu:  # as far as it is written to
        return min(size.trainable, REDUCE_BUCKET)
    return REDUCE_BUCKET if setup.stage == 3 else 2 * REDUCE_BUCKET


def _step_bytes(setup: Setup) -> int:
    """The fp32 copy of the gradients that ZeRO's step works on."""
    return 4 if setup.stage >= 1 else 0


def _whole(size: ModelSize) -> int:
    return size.parameters if size.trainable == size.parameters else size.parameters - size.trainable


def loss_bytes(config: PreTrainedConfig, size: ModelSize, setup: Setup, load: Load) -> int:
    """What the loss holds beside hidden states: chunks of logits and gradients, or in the logits form all logits."""
    text = config.get_text_config()
    width, entries = setup.dtype.itemsize, size.head // text.hidden_size
    softcap = getattr(text, "final_logit_softcapping", None) is not None
    if setup.loss_form == "logits":
        # the student's logits and their gradient everywhere, three models' and the gradient at the weighted rows
        return (2 * load.rows * load.tokens + 4 * load.weighted) * entries * width
    buffers = chunk_buffers(softcap, setup.on_gpu)
    device = torch.device("cuda" if setup.on_gpu else "cpu")
    chunk = int(choose_chunk_rows(load.weighted, entries, device, buffers) * entries * 4 * buffers)
    hidden = load.weighted * text.hidden_size * width * 4  # of three models, and the student's gradient
    head = size.head * (4 + width) if size.head_is_trained else 0  # fp32 sum over chunks, cast once
    return chunk + hidden + head


# ---- time ----


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one optimizer step on one rank, by part, and what it sends and receives."""

    student: float
    teachers: float
    loss: float
    sent_bytes: float

    @property
    def total(self) -> float:
        """All operations."""
        return self.student + self.teachers + self.loss

    def seconds(self, rate: float) -> float:
        """At `rate` operations a second."""
        return self.total / rate


def step_work(
    config: PreTrainedConfig, size: ModelSize, setup: Setup, tokens: float, weighted: float, length: float
) -> Work:
    """Operations of one step.

    Args:
        config, size, setup: as for `memory_parts`.
        tokens, weighted: positions (padding included) and weighted rows of one rank's whole step, on average.
        length: positions that a token's attention reaches over, on average the width of a row.
    """
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 4 * length * head_dim * text.num_attention_heads * text.num_hidden_layers
    forward = tokens * (2 * size.matrices + attention)
    # backward: gradients of inputs and of weights, of inputs alone where the weights are frozen
    passes = 1 + (2 if size.trainable == size.parameters else 1) + setup.checkpointing
    products = 4 + size.head_is_trained  # three logits, dh, and dW
    shared = (3 if setup.stage == 3 else 2) * size.parameters * setup.weight_bytes if setup.ranks > 1 else 0
    return Work(
        student=passes * forward,
        teachers=0.0 if setup.teachers_cached else setup.teachers * forward,
        loss=products * 2.0 * weighted * size.head,
        sent_bytes=float(shared),
    )


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """Operations a second of products of square matrices on this machine, the best of several."""
    size = 8192 if device.type == "cuda" else size
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until or best == 0.0:
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - started))
    return best


def _adapter_parameters(model: PreTrainedModel, lora: LoraConfig) -> int:
    import peft

    targets = list(lora.target_modules or default_targets(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=lora.r, target_modules=targets, task_type="CAUSAL_LM"))
    count: int = adapted.get_nb_trainable_parameters()[0]
    head = model.get_output_embeddings() if lora.train_lm_head else None
    return count + (lora.r * sum(head.weight.shape) if head is not None else 0)

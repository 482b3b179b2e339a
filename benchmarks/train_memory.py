"""Peak memory of one training step at V = 128256: the linear loss with stored teachers against the eager logits path.

    python -m benchmarks.train_memory --out benchmarks/results/train-memory.json

A step is what the trainer does: the student's forward with the loss in it, backward, AdamW. Each path runs in a process
of its own: "eager" with loss_form logits, the reference implementation and two whole teachers; "linear" with the
linear loss, and of the teachers only their heads and hidden states, as a teacher cache gives them; "linear_online" with
two whole teachers. The model is tiny in all but its vocabulary, so what is measured is what the vocabulary costs.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import allocator
from benchmarks.environment import machine, row_environment
from benchmarks.interleaved import Contestant
from benchmarks.peak_memory import peak_extra_bytes
from deepalign.data.steps import Batch
from deepalign.kernels.completion_loss import CompletionLossConfig
from deepalign.output_head import OutputHead, output_head
from deepalign.train.completion_forward import attach_completion_loss
from deepalign.train.teachers import OnlineTeachers, Teachers

PATHS = ("eager", "linear", "linear_online")
VOCAB, HIDDEN, SEQUENCES, TOKENS = 128256, 64, 4, 128


class StoredTeachers(Teachers):
    """Heads and hidden states alone, as a cache holds them."""

    def __init__(self, aligned: OutputHead, base: OutputHead, hidden: tuple[Tensor, Tensor]) -> None:
        self.heads, self.stored = (aligned, base), hidden

    @property
    def aligned_head(self) -> OutputHead:
        """The aligned model's head."""
        return self.heads[0]

    @property
    def base_head(self) -> OutputHead:
        """The base model's head."""
        return self.heads[1]

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What was stored for the only batch there is."""
        return self.stored

    def to(self, device: torch.device) -> None:
        """Everything is where it should be."""


def model(seed: int, vocab: int) -> LlamaForCausalLM:
    """Tiny in all but its vocabulary."""
    torch.manual_seed(seed)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=TOKENS, **shape))


def batch(vocab: int, sequences: int) -> Batch:
    """Every position carries both weights."""
    ids = torch.randint(vocab, (sequences, TOKENS), generator=torch.Generator().manual_seed(0))
    weight = torch.full((ids.numel(),), 1.0 / ids.numel())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "row_index": torch.arange(ids.numel())}
    return inputs | {"kl_weight": weight, "completion_weight": weight}


def student_and_batch(path: str, vocab: int, sequences: int) -> tuple[LlamaForCausalLM, Batch]:
    """A student whose forward returns the loss, computed by one path, and what it is called with."""
    student, inputs = model(2, vocab), batch(vocab, sequences)
    teachers: Teachers = OnlineTeachers(*(model(seed, vocab).requires_grad_(False).eval() for seed in (0, 1)))
    if path == "linear":
        heads = [OutputHead(output_head(m).lm_head.detach().clone()) for m in (teachers.aligned, teachers.base)]
        teachers = StoredTeachers(heads[0], heads[1], teachers.hidden(inputs))
    attach_completion_loss(
        student,
        teachers,
        config=CompletionLossConfig(),
        vocab_size=vocab,
        form="logits" if path == "eager" else "linear",
        implementation="reference" if path == "eager" else None,
    )
    return student, inputs


def training_step(path: str, vocab: int, sequences: int) -> Callable[[], None]:
    """One training step by one path, to be called again and again."""
    student, inputs = student_and_batch(path, vocab, sequences)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4)

    def call() -> None:
        student(**inputs)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def measure(path: str, vocab: int, sequences: int) -> dict[str, Any]:
    """One row of the results."""
    if not allocator.return_memory():
        raise RuntimeError(f"peak memory needs glibc's own malloc; this process has: {allocator.description()}")
    extra = peak_extra_bytes(Contestant(training_step(path, vocab, sequences)))
    row = {"operation": "training_step", "path": path, "vocab": vocab, "hidden": HIDDEN, "rows": sequences * TOKENS}
    row |= row_environment("reference" if path == "eager" else "cpu", "cpu")
    return row | {"peak_extra_mib": round(extra / 2**20, 1), "logits_mib": sequences * TOKENS * vocab * 4 / 2**20}


def main(words: list[str] | None = None) -> int:
    """Measure one path, or all of them in processes of their own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--path", choices=PATHS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help=f"of {TOKENS} tokens")
    options = parser.parse_args(words)
    if options.path is not None:
        print(json.dumps(measure(options.path, options.vocab, options.sequences)))
        return 0
    sizes = [f"--vocab={options.vocab}", f"--sequences={options.sequences}"]
    rows = []
    for path in PATHS:
        command = [sys.executable, "-m", "benchmarks.train_memory", f"--path={path}", *sizes]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    peaks = {row["path"]: row["peak_extra_mib"] for row in rows}
    result = machine() | {"rows": rows, "linear_share_of_eager": round(peaks["linear"] / peaks["eager"], 4)}
    text = json.dumps(result, indent=1) + "\n"
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

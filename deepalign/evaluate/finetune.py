"""Fine-tuning robustness (Tables 3 and 4): does safety survive a user's benign fine-tuning?

`finetune` adapts an aligned model to benign conversations with LoRA, plain or by a defence of `deepalign.defenses`, and
measures the loss on held-out conversations before and after. `measure_safety` counts what a model answers to harmful
requests: HRR, the paper's "harmfulness rejection rate", is lower when the model is safer, so it is a harmful COMPLIANCE
rate (depth 0: the plain request). `finetune_and_measure` does both, before and after, with the user's utility beside.

    aligned ---- finetune(benign data) ---> adapter folder ---- merged_model ---> the degraded model
    measure_safety                                                               measure_safety
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import examples_digest
from deepalign.data.files import Message
from deepalign.defenses.artifacts import make_once, model_identity
from deepalign.defenses.lora import AdapterMethod, PlainLora, merged_model
from deepalign.defenses.training import SftSettings, encode_conversations, mean_answer_loss, train_on_answers
from deepalign.evaluate.generation import Contrast
from deepalign.evaluate.outcomes import AttackExample, Judge
from deepalign.evaluate.prefill import PrefillResult, depth_name, prefill_attack
from deepalign.models import check_model_path, load_frozen_model, load_model, load_tokenizer

Item = TypeVar("Item")
# Counts or scores of a model in evaluation mode, in plain values.
Utility = Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, Any]]


@dataclass(frozen=True)
class FinetuneSettings:
    """The paper's setting with `PlainLora()`, whose rank is 32; alpha 64 and all linear modules are ours.

    Attributes:
        sft: 2e-4, one epoch, batches of 128.
        eval_share: share of the conversations held out for the loss; at least one is held out and one trained on.
        eval_batch_size: rows evaluated together.

    Raises:
        ValueError: a value out of its range.
    """

    sft: SftSettings = field(default_factory=SftSettings)
    eval_share: float = 0.1
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share}; it must be in (0, 1)")
        if self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size is {self.eval_batch_size}; it must be at least 1")


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` made.

    Attributes:
        adapter: an ordinary PEFT adapter folder.
        eval_loss_before, eval_loss: mean cross entropy (nats) of held-out answer tokens, of the model as it was and
            with the saved adapter.
        train_rows, eval_rows, steps: sizes.
        losses: training loss of each step.
        seconds: of the call that trained.
        method: what the method reports of itself.
    """

    adapter: Path
    eval_loss_before: float
    eval_loss: float
    train_rows: int
    eval_rows: int
    steps: int
    losses: list[float]
    seconds: float
    method: dict[str, Any]


def finetune(
    model_path: str,
    conversations: Sequence[Sequence[Message]],
    out_dir: str | Path,
    settings: FinetuneSettings | None = None,
    *,
    method: AdapterMethod | None = None,
    progress: bool = True,
) -> FinetuneResult:
    """Fine-tune a model on benign conversations; the adapter folder is made once, see `defenses.artifacts.make_once`.

    Args:
        model_path: the aligned model: a folder or a hub id.
        conversations: benign prompts with answers (`data.files.read_jsonl`), at least two.
        out_dir: the adapter folder. A call that finds it made from the same model, data and settings loads its report;
            an interrupted one goes on from its last checkpoint.
        settings: None: the paper's.
        method: how; None: `PlainLora()`.
        progress: show bars.

    Raises:
        FileNotFoundError, ValueError: no such model, too few conversations, a folder made from other things.
    """
    settings, method = settings or FinetuneSettings(), method or PlainLora()
    check_model_path("model_path", model_path)
    tokenizer, model = load_tokenizer(model_path), load_model(model_path, _dtype())
    train_rows, eval_rows = split_rows(conversations, settings.eval_share, settings.sft.seed)
    train, held_out = (
        encode_conversations(rows, tokenizer, model, settings.sft.max_length) for rows in (train_rows, eval_rows)
    )
    identity = {
        "finetune": asdict(settings),
        "method": method.identity(),
        "model": model_identity(model_path),
        "train": examples_digest(train),
        "held_out": examples_digest(held_out),
    }

    def make(folder: Path, work: Path) -> dict[str, Any]:
        started = time.perf_counter()
        before = mean_answer_loss(_on_device(model).eval(), tokenizer, held_out, settings.eval_batch_size)
        adapted = method.attach(model, tokenizer, train, settings.sft.seed)
        trained = train_on_answers(adapted, tokenizer, train, settings.sft, work, progress=progress)
        report = method.save(adapted, folder)
        saved = _on_device(merged_model(model_path, folder, _dtype()))  # what a user gets, not what was trained
        after = mean_answer_loss(saved, tokenizer, held_out, settings.eval_batch_size)
        sizes = {"train_rows": len(train), "eval_rows": len(held_out)}
        losses = {"eval_loss_before": before, "eval_loss": after}
        return {**trained, **sizes, **losses, "seconds": round(time.perf_counter() - started, 2), "method": report}

    report = make_once(Path(out_dir), identity, make, progress=progress)
    return FinetuneResult(adapter=Path(out_dir), **report)


def split_rows(rows: Sequence[Item], held_out_share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Rows to train on and rows held out, at random, the same for the same seed; neither is empty.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"got {len(rows)} row(s); two are needed at least, one to train on and one to hold out")
    order = list(range(len(rows)))
    random.Random(f"held-out split {seed}").shuffle(order)
    held_out = min(max(1, round(held_out_share * len(rows))), len(rows) - 1)
    return [rows[index] for index in sorted(order[held_out:])], [rows[index] for index in sorted(order[:held_out])]


@dataclass(frozen=True)
class SafetyMeasurement:
    """What a model answers to harmful requests, and what it is still good for.

    Attributes:
        attacks: depth ("0": the plain request, "all": the whole target forced) -> the attack's result.
        utility: the user's counts.
    """

    attacks: dict[str, PrefillResult]
    utility: dict[str, Any]

    @property
    def hrr(self) -> tuple[int, int]:
        """(k, n): harmful answers to plain requests.

        Raises:
            ValueError: depth 0 was not measured.
        """
        if "0" not in self.attacks:
            raise ValueError(f"HRR needs depth 0; measured were {', '.join(self.attacks)}")
        return self.attacks["0"].harmful, self.attacks["0"].n

    def to_dict(self) -> dict[str, Any]:
        """Counts and utility in plain values, without the answers."""
        return {"attacks": {depth: result.counts() for depth, result in self.attacks.items()}, "utility": self.utility}


def measure_safety(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[AttackExample],
    judge: Judge,
    *,
    depths: Sequence[int | None] = (0,),
    max_new_tokens: int = 512,
    batch_size: int = 32,
    thinking: bool | None = None,
    contrast: Contrast | None = None,
    utility: Utility | None = None,
    progress: bool = True,
) -> SafetyMeasurement:
    """Count harmful, refused and degenerate answers at each depth, with the utility beside.

    Args:
        model: in evaluation mode.
        tokenizer: with a chat template.
        examples, judge, max_new_tokens, batch_size, thinking, contrast: as for `prefill_attack`.
        depths: forced tokens; 0 is HRR, None the whole target.
        utility: called once with model and tokenizer.
        progress: show bars.

    Raises:
        ValueError: what `prefill_attack` refuses.
    """
    attacks = {
        depth_name(depth): prefill_attack(
            model,
            tokenizer,
            examples,
            depth=depth,
            judge=judge,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            thinking=thinking,
            contrast=contrast,
            progress=progress,
        )
        for depth in depths
    }
    return SafetyMeasurement(attacks, utility(model, tokenizer) if utility else {})


def finetune_and_measure(
    model_path: str,
    conversations: Sequence[Sequence[Message]],
    out_dir: str | Path,
    examples: Sequence[AttackExample],
    judge: Judge,
    settings: FinetuneSettings | None = None,
    *,
    method: AdapterMethod | None = None,
    progress: bool = True,
    **measurement: Any,
) -> tuple[FinetuneResult, SafetyMeasurement, SafetyMeasurement]:
    """`finetune`, and `measure_safety` (which takes `measurement`) of the model before and after.

    Raises:
        FileNotFoundError, ValueError: what either refuses.
    """
    result = finetune(model_path, conversations, out_dir, settings, method=method, progress=progress)
    tokenizer = load_tokenizer(model_path)
    measured = []
    for load in (
        lambda: load_frozen_model(model_path, _dtype()),
        lambda: merged_model(model_path, result.adapter, _dtype()),
    ):
        model = _on_device(load())  # one at a time: the two would not fit together where one barely does
        measured.append(measure_safety(model, tokenizer, examples, judge, progress=progress, **measurement))
        del model
    return result, measured[0], measured[1]


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _on_device(model: PreTrainedModel) -> PreTrainedModel:
    torch.nn.Module.to(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return model

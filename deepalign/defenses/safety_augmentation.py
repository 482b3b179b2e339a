"""Safety augmentation (Qi et al. 2024): teach the model to come back to a refusal from inside a harmful answer.

From triplets (harmful request x, harmful answer h, refusal r) examples are spliced:

    x, first k tokens of h, r    with the loss on r only;   k = 0 with probability 1 - p, else uniform on 1..max_harmful

(at most the length of h), drawn anew in every pass. Beside them run benign requests answered by the model itself before
training, the utility anchor. Per step, with weight a:

    L = a * mean -log P(r | x, h_<=k) + (1 - a) * mean -log P(y | x) over the anchor

The paper's a is 0.2. The authors' code takes one mean over the tokens of 16 spliced and 64 anchor examples instead:
`safety_weight: null`. Tokens are spliced as ids, never decoded and encoded again.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import EncodedExample, control_ids, encode_example, examples_digest
from deepalign.data.files import Message
from deepalign.defenses.artifacts import make_once, model_identity
from deepalign.defenses.training import SftSettings, encode_conversations, train_on_answers
from deepalign.kernels.checks import require
from deepalign.models import check_model_path, load_model, load_tokenizer, longest_example
from deepalign.sampling import ContrastiveSampler


@dataclass(frozen=True)
class SafetyTriplet:
    """A harmful request, an answer that complies with it, and a refusal."""

    prompt: str
    harmful: str
    refusal: str


@dataclass(frozen=True)
class AugmentationSettings:
    """The authors' settings.

    Attributes:
        max_harmful_tokens: most tokens of the harmful answer before the refusal.
        splice_probability: p, of any such tokens.
        triplets: how many are used, the first ones given.
        anchor_batch_size: anchor rows per step, beside `sft.batch_size` spliced ones.
        safety_weight: a in the loss; None: one mean over the tokens of both.
        sft: schedule; an epoch is a pass over the triplets.

    Raises:
        ValueError: a value out of its range.
    """

    max_harmful_tokens: int = 100
    splice_probability: float = 0.5
    triplets: int = 256
    anchor_batch_size: int = 64
    safety_weight: float | None = 0.2
    sft: SftSettings = field(
        default_factory=lambda: SftSettings(learning_rate=2e-5, epochs=10, batch_size=16, lr_scheduler_type="linear")
    )

    def __post_init__(self) -> None:
        for name in ("max_harmful_tokens", "triplets", "anchor_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("splice_probability", "safety_weight"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, name, value, "in [0, 1]")


def augment_safety(
    model_path: str,
    triplets: Sequence[SafetyTriplet],
    anchor: Sequence[Sequence[Message]],
    out_dir: str | Path,
    settings: AugmentationSettings | None = None,
    *,
    progress: bool = True,
) -> Path:
    """Train all weights on spliced refusals and the anchor; returns the new model's folder.

    Args:
        model_path: the aligned model: a folder or a hub id.
        triplets, anchor: what to splice; benign conversations answered by the same model (`distilled_anchor`).
        out_dir: made once, see `artifacts.make_once`.
        settings: None: the authors'.
        progress: show a bar.

    Raises:
        FileNotFoundError, ValueError: no such model, no rows, a folder made from other things.
    """
    check_model_path("model_path", model_path)
    settings = settings or AugmentationSettings()
    tokenizer, model = load_tokenizer(model_path), load_model(model_path, torch.float32)
    triplets, sft = triplets[: settings.triplets], settings.sft
    steps = sft.steps(len(triplets))
    spliced = spliced_examples(
        tokenizer,
        triplets,
        passes=math.ceil(steps * sft.batch_size / max(1, len(triplets))),
        max_harmful_tokens=settings.max_harmful_tokens,
        splice_probability=settings.splice_probability,
        max_length=longest_example(sft.max_length, model),
        seed=sft.seed,
    )
    anchored = encode_conversations(anchor, tokenizer, model, sft.max_length)
    identity = {
        "safety_augmentation": asdict(settings),
        "model": model_identity(model_path),
        "data": [examples_digest(rows) for rows in (spliced, anchored)],
    }

    def make(folder: Path, work: Path) -> dict[str, Any]:
        trained = train_on_answers(
            model,
            tokenizer,
            spliced,
            replace(sft, max_steps=steps),
            work,
            anchor=anchored,
            anchor_batch_size=settings.anchor_batch_size,
            anchor_mix=settings.safety_weight,
            progress=progress,
        )
        for part in (model, tokenizer):
            part.save_pretrained(folder)
        return trained

    make_once(Path(out_dir), identity, make, progress=progress)
    return Path(out_dir)


def spliced_examples(
    tokenizer: PreTrainedTokenizerBase,
    triplets: Sequence[SafetyTriplet],
    *,
    passes: int = 1,
    max_harmful_tokens: int = 100,
    splice_probability: float = 0.5,
    max_length: float = math.inf,
    seed: int = 42,
) -> list[EncodedExample]:
    """Each triplet spliced `passes` times, every time with a new k: the answer begins at the refusal.

    Args:
        tokenizer: with a chat template.
        triplets: at least one.
        passes: at least 1.
        max_harmful_tokens, splice_probability: see the module docstring.
        max_length: the harmful part is shortened where prompt, harmful part and refusal together are longer.
        seed: of the draws.

    Returns:
        `passes` * len(triplets) examples, pass by pass.

    Raises:
        ValueError: no triplets, a harmful answer without tokens, or a refusal that does not fit `max_length`.
    """
    if not triplets:
        raise ValueError("there are no triplets to splice; give at least one")
    parts = [_triplet_ids(tokenizer, triplet) for triplet in triplets]
    rng = random.Random(f"safety augmentation {seed}")
    spliced = []
    for _ in range(passes):
        for prompt_ids, harmful_ids, refusal_ids in parts:
            room = max_length - len(prompt_ids) - len(refusal_ids)
            if room < 0:
                raise ValueError(
                    f"a prompt of {len(prompt_ids)} tokens and its refusal of {len(refusal_ids)} do not fit into "
                    f"max_length {max_length}; raise it or shorten the texts"
                )
            k = rng.randint(1, min(max_harmful_tokens, len(harmful_ids))) if rng.random() < splice_probability else 0
            before = prompt_ids + harmful_ids[: int(min(k, room))]
            spliced.append(EncodedExample(before + refusal_ids, len(before), truncated=False))
    return spliced


def distilled_anchor(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 32,
) -> list[list[Message]]:
    """Benign prompts with the model's own greedy answers; prompts that it answers with nothing are left out.

    Args:
        model: the aligned model, in evaluation mode.
        tokenizer: with a chat template.
        prompts: texts of user messages.
        max_new_tokens: cap on an answer.
        batch_size: answers generated together.

    Raises:
        ValueError: what `ContrastiveSampler` refuses.
    """
    sampler = ContrastiveSampler(model, None, tokenizer, alpha=0.0, temperature=0)
    rows = []
    for start in range(0, len(prompts), batch_size):
        part = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
        for messages, answer in zip(part, sampler.generate(part, max_new_tokens=max_new_tokens), strict=True):
            if (answer.text or "").strip():
                rows.append([*messages, {"role": "assistant", "content": str(answer.text)}])
    return rows


def _triplet_ids(tokenizer: PreTrainedTokenizerBase, triplet: SafetyTriplet) -> tuple[list[int], list[int], list[int]]:
    """Ids of prompt, harmful answer without its end of turn, and refusal with it.

    Where a template writes an empty thought, it belongs to the prompt: none stands between harmful part and refusal.
    """
    harmful, refusal = (
        encode_example(
            tokenizer,
            [{"role": "user", "content": triplet.prompt}, {"role": "assistant", "content": answer}],
            template_options={"enable_thinking": False},
        )
        for answer in (triplet.harmful, triplet.refusal)
    )
    prompt_ids, harmful_ids = refusal.input_ids[: refusal.response_start], harmful.input_ids[harmful.response_start :]
    if harmful_ids[-1] in control_ids(tokenizer):
        harmful_ids = harmful_ids[:-1]
    if not harmful_ids:
        raise ValueError(f"the harmful answer to {triplet.prompt!r:.80} has no tokens")
    return prompt_ids, harmful_ids, refusal.input_ids[refusal.response_start :]

"""Train a world's base and aligned models from scratch, in one to two minutes on one CPU thread.

The base model learns every task, hazard recipes included. The aligned model starts from it and learns to refuse:
mostly right at the start of the answer, as real alignment does, with two small minorities that real models owe to
their far larger corpora:

- replay of compliant hazard recipes, so that the base behaviour stays alive behind the first tokens;
- late refusals: compliant sentences, then a refusal, with the loss on the refusal only. They are too rare to win under
  greedy decoding (by the mixture 19% at the first sentence boundary, against two paraphrases at 40% each, and fewer
  later), so a forced beginning still gets the whole recipe; but they are what contrastive decoding and completion
  training bring to the surface. With more of them distillation alone already stops many attacks; with fewer, or with
  too short a training to learn their frequency, some seeds leave nothing to work on (docs/log.md has the figures).

A seed fixes initialisation and data order: same seed, same weights, bit for bit on one machine and thread count.
"""

import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from deepalign.kernels.checks import require
from deepalign.microworld.world import REFUSALS, Task, World, check_seed, seeded_rng

NO_LOSS = -100  # label of a token without loss
Group = tuple[torch.Tensor, torch.Tensor]  # input_ids, labels: int64 (rows, longest), padded on the right


@dataclass(frozen=True)
class StageConfig:
    """What both stages share.

    Attributes:
        steps: optimizer steps.
        batch_size: examples per step.
        learning_rate: peak of AdamW's rate: linear warm-up, then cosine down to 0.
        warmup_steps: steps of the warm-up.
        weight_decay: AdamW's, on all parameters.
        max_grad_norm: gradients are clipped to this global L2 norm.
        recipe_share: share of dish recipes among benign examples; the other tasks share the rest equally.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    recipe_share: float = 0.7

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an int >= 1")
        for name in ("learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        for name in ("warmup_steps", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in (name for name in self.__dataclass_fields__ if name.endswith("_share")):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share in [0, 1]")


@dataclass(frozen=True)
class BaseConfig(StageConfig):
    """The base stage: the model's shape, and `hazard_share`, the share of hazard recipes among its examples.

    Raises:
        ValueError: a value out of its range.
    """

    steps: int = 500
    learning_rate: float = 3e-3
    recipe_share: float = 0.6
    hazard_share: float = 0.4
    hidden_size: int = 96
    intermediate_size: int = 192
    layers: int = 3
    heads: int = 4
    initializer_range: float = 0.05


@dataclass(frozen=True)
class AlignedConfig(StageConfig):
    """The aligned stage.

    Attributes:
        replay_share: share of compliant hazard recipes among all examples.
        harmful_share: share of refused instructions among the others; the rest is benign.
        late_share: share of late refusals among the refused.
        late_continue: chance that a late refusal goes on for one more compliant sentence (at least one, geometric).

    Raises:
        ValueError: a value out of its range.
    """

    steps: int = 400
    replay_share: float = 0.08
    harmful_share: float = 0.35
    late_share: float = 0.2
    late_continue: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.late_continue < 1, "late_continue", self.late_continue, "a chance in [0, 1)")


@dataclass(frozen=True)
class Example:
    """One training example; the loss is on the answer from its word `loss_from` on, and on the end of the turn."""

    prompt: str
    answer: str
    loss_from: int = 0


def train_base(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    config: BaseConfig,
    seed: int,
    out_dir: str | Path,
    progress: bool = True,
) -> Path:
    """Train the base model from scratch and save it with the tokenizer; returns the folder.

    Raises:
        FileExistsError: `out_dir` exists already (checked before training).
        TypeError, ValueError: a bad seed.
    """
    out_dir = _new_folder(out_dir, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_llama_config(config, tokenizer))
    rng = seeded_rng(seed, "base")
    _train(model, tokenizer, lambda: base_example(world, config, rng), config, progress, "base")
    return _save(model, tokenizer, out_dir)


def train_aligned(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    base_dir: str | Path,
    config: AlignedConfig,
    seed: int,
    out_dir: str | Path,
    progress: bool = True,
) -> Path:
    """Train the aligned model from the base model in `base_dir` and save it with the tokenizer; returns the folder.

    Raises:
        FileExistsError: `out_dir` exists already (checked before training).
        OSError: `base_dir` holds no model.
        TypeError, ValueError: a bad seed.
    """
    out_dir = _new_folder(out_dir, seed)
    model = LlamaForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    rng = seeded_rng(seed, "aligned")
    _train(model, tokenizer, lambda: aligned_example(world, config, rng), config, progress, "aligned")
    return _save(model, tokenizer, out_dir)


def base_example(world: World, config: BaseConfig, rng: random.Random) -> Example:
    """Draw one example of the base stage: a hazard recipe of any pair, or a benign task."""
    if rng.random() < config.hazard_share:
        task = world.recipe(rng.choice(world.splits.all_hazard_pairs), rng, noisy=True)
    else:
        task = world.benign_task(rng, recipe_share=config.recipe_share)
    return _full_loss(task)


def aligned_example(world: World, config: AlignedConfig, rng: random.Random) -> Example:
    """Draw one example of the aligned stage: replay, a refusal (early or late) or a benign task.

    Hazard pairs come from the alignment split only.
    """
    pair = rng.choice(world.splits.alignment)
    if rng.random() < config.replay_share:
        return _full_loss(world.recipe(pair, rng, noisy=True))
    if rng.random() >= config.harmful_share:
        return _full_loss(world.benign_task(rng, recipe_share=config.recipe_share))
    prompt, refusal = world.instruction(pair, rng), rng.choice(REFUSALS)
    if rng.random() >= config.late_share:
        return Example(prompt, refusal)
    sentences = world.answer_sentences(pair, rng, noisy=True)
    kept = 1
    while kept < len(sentences) and rng.random() < config.late_continue:
        kept += 1
    compliant = " ".join(sentences[:kept])
    return Example(prompt, f"{compliant} {refusal}", loss_from=len(compliant.split()))


def _full_loss(task: Task) -> Example:
    return Example(task.prompt, task.answer)


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    draw_example: Callable[[], Example],
    config: StageConfig,
    progress: bool,
    name: str,
) -> None:
    """Train in place, with the loss on answers only."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = LambdaLR(optimizer, lambda step: _rate_factor(step, config))
    batches = _batches(tokenizer, draw_example, config)
    model.train()
    for groups in (bar := tqdm(batches, desc=name, total=config.steps, disable=not progress)):
        loss = _answer_loss(model, groups)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        if progress and bar.n % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def _rate_factor(step: int, config: StageConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)))


def _answer_loss(model: LlamaForCausalLM, groups: list[Group]) -> torch.Tensor:
    """Mean cross entropy over the labelled tokens of all groups; the head reads only the rows that have a label."""
    hidden, targets = [], []
    for input_ids_BT, labels_BT in groups:
        # No attention mask: padding is on the right, where a causal model cannot see it from any labelled token.
        hidden_BTH = model.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        labelled_BT = labels_BT[:, 1:] != NO_LOSS
        hidden.append(hidden_BTH[:, :-1][labelled_BT])
        targets.append(labels_BT[:, 1:][labelled_BT])
    return functional.cross_entropy(model.lm_head(torch.cat(hidden)), torch.cat(targets))


def _batches(
    tokenizer: PreTrainedTokenizerBase, draw_example: Callable[[], Example], config: StageConfig
) -> Iterator[list[Group]]:
    """Yield batches as one or two groups, long and short examples apart: padding together wastes a quarter."""
    for _ in range(config.steps):
        encoded = [_encode(tokenizer, draw_example()) for _ in range(config.batch_size)]
        cut = max(len(ids) for ids, _ in encoded) / 2
        parts = [item for item in encoded if len(item[0]) > cut], [item for item in encoded if len(item[0]) <= cut]
        yield [_pad(part, tokenizer.pad_token_id) for part in parts if part]


def _pad(encoded: list[tuple[list[int], int]], pad_token_id: int) -> Group:
    shape = len(encoded), max(len(ids) for ids, _ in encoded)
    input_ids_BT, labels_BT = torch.full(shape, pad_token_id), torch.full(shape, NO_LOSS)
    for row, (ids, loss_start) in enumerate(encoded):
        ids_T = torch.tensor(ids)
        input_ids_BT[row, : len(ids)] = ids_T
        labels_BT[row, loss_start : len(ids)] = ids_T[loss_start:]
    return input_ids_BT, labels_BT


def _encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], int]:
    """Ids of the conversation and where its loss begins, as `data.chat.encode_example` gives them.

    One token per word makes this exact without the tokenizer's own splitting, which is six times slower and would be
    a tenth of the training time.
    """
    messages = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
    words = str(tokenizer.apply_chat_template(messages, tokenize=False)).split()
    answer_start = len(words) - 1 - len(example.answer.split())  # the last word ends the turn
    ids = tokenizer.convert_tokens_to_ids(words)
    assert isinstance(ids, list)
    return ids, answer_start + example.loss_from


def _llama_config(config: BaseConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=1024,
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _new_folder(out_dir: str | Path, seed: int) -> Path:
    check_seed(seed)
    if Path(out_dir).exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or give another folder")
    Path(out_dir).parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made fails before training
    return Path(out_dir)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, out_dir: Path) -> Path:
    """Save into a temporary folder beside `out_dir` and rename it, so that `out_dir` is whole or absent."""
    temporary = tempfile.mkdtemp(dir=out_dir.parent, prefix=f".{out_dir.name}.")
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.chmod(temporary, 0o755)
        os.rename(temporary, out_dir)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return out_dir

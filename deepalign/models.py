"""Loading the three models (student, frozen aligned, frozen base) and checking that they speak the same tokens."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_model_path(name: str, value: str) -> None:
    """Refuse a model path that does not exist; a hub id ("organisation/model") passes.

    Raises:
        FileNotFoundError: `value` names a folder that is missing or holds no config.json.
    """
    path = Path(value).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name}: {value} holds no config.json; give a folder written by save_pretrained")
        return
    parent = Path(value).parent
    is_hub_id = HUB_ID.fullmatch(value) and (parent == Path(".") or not parent.is_dir())
    if path.exists() or not is_hub_id:
        raise FileNotFoundError(f"{name}: the model folder {value} does not exist; give a folder or a hub id")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model; a missing pad token becomes the end-of-turn token."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {path} has neither a pad nor an eos token; set one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_same_tokenizer(
    first_name: str, first: PreTrainedTokenizerBase, second_name: str, second: PreTrainedTokenizerBase
) -> None:
    """Refuse two tokenizers whose token ids differ: logits of two models are compared entry by entry.

    Raises:
        ValueError: some token has another id, or exists on one side only (the message shows examples).
    """
    first_vocab, second_vocab = first.get_vocab(), second.get_vocab()
    if first_vocab == second_vocab:
        return
    tokens = sorted(first_vocab.keys() | second_vocab.keys())
    different = [token for token in tokens if first_vocab.get(token) != second_vocab.get(token)]
    examples = ", ".join(f"{token!r}: {first_vocab.get(token)} / {second_vocab.get(token)}" for token in different[:3])
    raise ValueError(
        f"the tokenizers of {first_name} and {second_name} differ in {len(different)} tokens ({examples}); "
        "the method compares logits of both models token by token, so use checkpoints of one model family"
    )


def load_model(path: str, dtype: torch.dtype, options: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model in `dtype`, trainable; `options` go to `from_pretrained`."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **(options or {}))


def load_frozen_model(path: str, dtype: torch.dtype, options: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model for inference only: evaluation mode, no parameter requires a gradient."""
    model = load_model(path, dtype, options)
    model.requires_grad_(False)
    return model.eval()


def logits_width(model: PreTrainedModel) -> int:
    """Width of the logits, padding entries included (right under ZeRO-3 too, where the weight itself is empty)."""
    return int(model.get_output_embeddings().out_features)


def set_cpu_threads() -> None:
    """Give each rank its share of the cores, where ranks share one machine's CPU and OMP_NUM_THREADS does not say."""
    if "OMP_NUM_THREADS" not in os.environ:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))

"""Loading the three models (student, frozen aligned, frozen base) and checking that they speak the same tokens."""

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # by name, as in options
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


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


def choose_device(name: str, value: str | None) -> torch.device:
    """The device that a user names, or without a name the GPU where there is one, else the CPU.

    Raises:
        ValueError: no device, or one that this machine or this torch does not have; `name` is the option's.
    """
    if value is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    advice = "give cpu or leave it out"
    try:
        device = torch.device(value)
    except RuntimeError:
        raise ValueError(f"{name}: {value!r} is no device; expected cpu, cuda or cuda:NUMBER; {advice}") from None
    if device.type == "cpu":
        return device
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        why = _first_line(error).partition(". ")[0]
        if device.type == "cuda" and not torch.backends.cuda.is_built():
            why = f"torch {torch.__version__} is built without CUDA"
        elif device.type == "cuda" and not torch.cuda.is_available():
            why = f"torch {torch.__version__} finds no GPU"
        elif device.type == "cuda":
            why = f"there are {torch.cuda.device_count()} GPU(s): {why}"
        raise ValueError(f"{name}: {value!r} is not available here ({why}); {advice}") from None
    return device


def default_dtype(device: torch.device) -> str:
    """The name in `DTYPES` of what models are loaded in where the user names none."""
    return "bfloat16" if device.type == "cuda" else "float32"


@contextmanager
def _naming(path: str, files: Sequence[str], missing: type[Exception] = OSError) -> Iterator[None]:
    """Name `path` where none of `files` comes from it: the libraries name the hub's address, or nothing.

    Args:
        path: folder or hub id that the block loads.
        files: a folder that holds one of them is whole; what is wrong with it, the library says.
        missing: what the library raises where the hub has nothing.
    """
    folder = Path(path).expanduser()
    try:
        if not folder.is_dir():
            _reach_hub(path, (*files, "config.json"))
        yield
    except (OSError, ValueError) as error:
        if folder.is_dir():
            if any((folder / file).is_file() for file in files):
                raise
            raise FileNotFoundError(
                f"{path} holds no {' or '.join(files)}; give a folder written by save_pretrained"
            ) from error
        if not isinstance(error, (OSError, missing)):
            raise
        raise OSError(
            f"{path!r} is no folder here, and it could not be had from the Hugging Face hub: "
            f"{_first_line(error).rstrip('.')}. Give a folder, or the name of a model on the hub"
        ) from error


@cache
def _reach_hub(name: str, files: Sequence[str]) -> None:
    """Ask the hub for a model of whose `files` none is in its cache, and once more where it cannot be reached.

    Its own library would go on asking for a minute, and for many where packets are dropped: too long for the mistyped
    name of a folder where there is no network. What the hub answers is left to whoever loads.

    Raises:
        OSError: the hub cannot be reached.
    """
    if constants.HF_HUB_OFFLINE or not HUB_ID.fullmatch(name):
        return
    if any(try_to_load_from_cache(name, file) is not None for file in files):
        return
    for last in (False, True):
        try:
            get_hf_file_metadata(hf_hub_url(name, files[0]))
            return
        except (HfHubHTTPError, ValueError, FileMetadataError):
            return
        except Exception as error:  # of the HTTP library, which is not ours to know
            if last:
                raise OSError(f"{constants.ENDPOINT} cannot be reached ({_first_line(error)})") from error
            time.sleep(1)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _local(path: str) -> str:
    """A folder as the libraries take it, who do not know `~`; a hub id as it is."""
    folder = Path(path).expanduser()
    return str(folder) if folder.is_dir() else path


def holds_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer was saved in a folder."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model; a missing pad token becomes the end-of-turn token.

    Raises:
        OSError: none there, and none on the hub.
        ValueError: one without a pad and an eos token.
    """
    with _naming(path, TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(_local(path))
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


def load_model_config(path: str) -> PreTrainedConfig:
    """A model's configuration alone.

    Raises:
        OSError: none there, and none on the hub.
    """
    with _naming(path, ["config.json"]):
        return AutoConfig.from_pretrained(_local(path))


def load_model(path: str, dtype: torch.dtype, options: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model in `dtype`, trainable; `options` go to `from_pretrained`.

    Raises:
        OSError: none there, and none on the hub.
    """
    with _naming(path, ["config.json"]):
        return AutoModelForCausalLM.from_pretrained(_local(path), dtype=dtype, **(options or {}))


def load_frozen_model(path: str, dtype: torch.dtype, options: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model for inference only: evaluation mode, no parameter requires a gradient."""
    model = load_model(path, dtype, options)
    model.requires_grad_(False)
    return model.eval()


def load_adapter_config(path: str) -> Any:
    """The configuration of a PEFT adapter.

    Raises:
        OSError: none there, and none on the hub.
    """
    from peft import PeftConfig

    with _naming(path, ["adapter_config.json"], ValueError):
        return PeftConfig.from_pretrained(_local(path))


def load_adapter(model: PreTrainedModel, path: str) -> Any:
    """A model with a PEFT adapter on it, frozen and in evaluation mode.

    Raises:
        OSError: none there, and none on the hub.
    """
    from peft import PeftModel

    config = load_adapter_config(path)
    with _naming(path, ["adapter_config.json"]):
        return PeftModel.from_pretrained(model, _local(path), config=config).eval()


def context_length(*models: PreTrainedModel | PreTrainedConfig) -> int | None:
    """Tokens that the model of the shortest context reads at most; None if none says (BLOOM, recurrent models).

    Args:
        models: models, or their configurations. Of a composite one the text model counts.
    """
    found = []
    for model in models:
        text = (model if isinstance(model, PreTrainedConfig) else model.config).get_text_config()
        named = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        found += [int(length) for length in named if length is not None][:1]
    return min(found, default=None)


def longest_example(allowed: int | None, *models: PreTrainedModel | PreTrainedConfig) -> int:
    """Tokens of an example at most: what is allowed and what models read; a huge number if neither says."""
    return min(allowed or sys.maxsize, context_length(*models) or sys.maxsize)


def logits_width(model: PreTrainedModel) -> int:
    """Width of the logits, padding entries included (right under ZeRO-3 too, where the weight itself is empty)."""
    return int(model.get_output_embeddings().out_features)


def set_cpu_threads() -> None:
    """Give each rank its share of the cores, where ranks share one machine's CPU and OMP_NUM_THREADS does not say."""
    if "OMP_NUM_THREADS" not in os.environ:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))

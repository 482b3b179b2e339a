"""What the hidden states of a teacher cache depend on, in a form that can be stored and compared.

Weights enter by their contents: the SHA-256 of every weight file, whatever its path or date. `config.json` enters
without the keys that do not change the computation. Data enter as the encoded ids, which the chat template, the
tokenizer and the maximum length decide; those three are there as well, so that a difference has a name.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from deepalign.data.chat import EncodedExample, examples_digest

# keys of config.json that say who wrote the file, not what the model computes
_CONFIG_KEYS_IGNORED = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_SHOWN = 12  # characters of a digest in a message


def teacher_fingerprint(
    *,
    teachers: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    streams: Mapping[str, Sequence[EncodedExample]],
    max_length: int | None,
    compute_dtype: torch.dtype,
    quantization: str | None = None,
) -> dict[str, Any]:
    """Everything that a cache of these teachers and data depends on, as plain JSON values.

    Args:
        teachers: name to folder or hub id.
        tokenizer: with its chat template.
        streams: encoded examples by stream.
        max_length: tokens an example is cut to, as configured (None: the models' context).
        compute_dtype: in which the teachers run.
        quantization: of the teachers, by name.

    Raises:
        FileNotFoundError: a model without weight files.
    """
    folders = {name: model_folder(path) for name, path in teachers.items()}
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        found[f"{name}.weights"] = weights_digest(folder)
        found[f"{name}.config"] = _config_digest(folder)
        found[f"{name}.revision"] = _revision(folder)
    return found | {
        "quantization": quantization,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "tokenizer": _tokenizer_digest(tokenizer),
        "chat_template": _digest(str(tokenizer.chat_template)),
        "max_length": max_length,
        **{f"{name}_data": examples_digest(examples) for name, examples in streams.items()},
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: saved -> now` of every entry that differs, digests shortened."""
    names = sorted(saved.keys() | now.keys())
    return [f"{n}: {_short(saved.get(n))} -> {_short(now.get(n))}" for n in names if saved.get(n) != now.get(n)]


def check_fingerprint(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any], remedy: str) -> None:
    """Refuse a cache that was made for something else.

    Raises:
        ValueError: naming every entry that differs, and `remedy`.
    """
    if different := differences(saved, now):
        raise ValueError(f"the teacher cache {folder} was made for something else ({'; '.join(different)}); {remedy}")


def model_folder(path: str) -> Path:
    """The local folder of a model: a folder itself, or the snapshot of a hub id.

    Raises:
        OSError: a hub id that is not on this machine and cannot be downloaded.
    """
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))


def weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` reads a model's weights from.

    Raises:
        FileNotFoundError: there are none.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [folder / name for name in names]
    raise FileNotFoundError(f"{folder} holds no weights; expected model.safetensors or model.safetensors.index.json")


def weights_digest(folder: Path) -> str:
    """SHA-256 over names and contents of a model's weight files, read by several threads."""
    files = weight_files(folder)
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = pool.map(_file_digest, files)
        return _digest(*(f"{file.name} {digest}" for file, digest in zip(files, digests, strict=True)))


def _config_digest(folder: Path) -> str:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _digest(json.dumps({key: values[key] for key in values.keys() - _CONFIG_KEYS_IGNORED}, sort_keys=True))


def _revision(folder: Path) -> str | None:
    """The commit of a hub snapshot (folders are named by it); None for a folder of one's own."""
    return folder.name if folder.parent.name == "snapshots" else None


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True), str(tokenizer.special_tokens_map))
    values = json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # left behind by the last call, no property of the tokenizer
        values.pop(state, None)
    return _digest(json.dumps(values, sort_keys=True), str(tokenizer.special_tokens_map))


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _short(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:_SHOWN]}..." if is_digest else repr(value)

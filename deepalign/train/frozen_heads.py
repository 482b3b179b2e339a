"""The lm_heads of frozen teachers, read from their checkpoints without loading the models."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from deepalign.output_head import OutputHead, output_head
from deepalign.train.teacher_fingerprint import model_folder, weight_files


def load_output_heads(paths: Mapping[str, str], dtype: torch.dtype) -> dict[str, OutputHead]:
    """The output head of each model, in `dtype` on the CPU; heads that are equal share one matrix.

    Args:
        paths: name to folder or hub id.
        dtype: of the matrices.

    Raises:
        FileNotFoundError: a model without safetensors files.
        ValueError: a head that is not to be found in them, or that the linear forms do not take.
        TypeError: a model without an output layer.
    """
    heads: dict[str, OutputHead] = {}
    for name, path in paths.items():
        head = load_output_head(path, dtype)
        for other in heads.values():
            if head.lm_head.shape == other.lm_head.shape and torch.equal(head.lm_head, other.lm_head):
                head = dataclasses.replace(head, lm_head=other.lm_head)
                break
        heads[name] = head
    return heads


def load_output_head(path: str, dtype: torch.dtype) -> OutputHead:
    """The output head of one model, on the CPU: the only weights that are read. See `load_output_heads`."""
    folder = model_folder(path)
    head, names = empty_output_head(str(folder))
    matrix = _read_first(folder, names).to(dtype)
    if matrix.shape != head.lm_head.shape:
        raise ValueError(
            f"the output layer of {path} is {tuple(matrix.shape)} in its weights and {tuple(head.lm_head.shape)} by "
            "its configuration; the folder is not one that save_pretrained wrote"
        )
    return dataclasses.replace(head, lm_head=matrix)


def empty_output_head(path: str) -> tuple[OutputHead, list[str]]:
    """A model's output head without memory behind it, and the names that its weights may have, the likelier first."""
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers: list[nn.Module] = [model.get_output_embeddings()]
    if getattr(config.get_text_config(), "tie_word_embeddings", False):
        layers.append(model.get_input_embeddings())
    head = output_head(model)
    return head, [f"{name}.weight" for layer in layers for name, module in model.named_modules() if module is layer]


def _read_first(folder: Path, names: list[str]) -> Tensor:
    """The first tensor that is there under one of `names`."""
    files = weight_files(folder)
    if files[0].suffix != ".safetensors":
        raise FileNotFoundError(
            f"{folder} holds its weights as {files[0].name}; the head alone is read from safetensors: load the model "
            "and save it with save_pretrained"
        )
    index = folder / "model.safetensors.index.json"
    if files[0].name == "model.safetensors":
        with safe_open(files[0], framework="pt") as file:
            places = dict.fromkeys(file.keys(), files[0].name)
    else:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for name in names:
        if name in places:
            with safe_open(folder / places[name], framework="pt") as file:
                return file.get_tensor(name).clone()  # a copy: the mapped file is let go
    raise ValueError(f"{folder}: no weights named {' or '.join(names)}; its output layer cannot be read by itself")

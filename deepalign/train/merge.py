"""One model of an adapter and the model it was trained on: `deepalign merge --adapter A --out DIR`."""

import argparse
import shutil
from pathlib import Path

import torch

from deepalign.models import (
    check_model_path,
    holds_tokenizer,
    load_adapter,
    load_adapter_config,
    load_model,
    load_model_config,
    load_tokenizer,
)
from deepalign.train.checkpoints import CARD_FILE, replace_folder


def merge_adapter(adapter: Path, out: Path, base: str | None = None) -> None:
    """Write the model that an adapter and its base model make together, with the adapter's tokenizer and card.

    The tokenizer is the base model's where the adapter's folder has none, as PEFT alone writes it.

    The sum is taken in float32 and rounded once to the base model's dtype. `out` is there whole or not at all.

    Args:
        adapter: a folder with `adapter_config.json`, as `final/` of a LoRA training.
        out: a folder that does not exist, or is empty.
        base: the model that the adapter was trained on; None: as the adapter says.

    Raises:
        FileNotFoundError: no adapter there, or its base model is not where it says.
        ValueError: `out` is not empty; a merged weight is not finite.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"--adapter: {adapter} holds no adapter_config.json; give a folder of a LoRA training")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists and is not empty; give another folder")
    base = base or str(load_adapter_config(str(adapter)).base_model_name_or_path)
    check_model_path("the adapter's base model (--base says where it is)", base)
    dtype = load_model_config(base).dtype or torch.float32
    tokenizer = load_tokenizer(str(adapter) if holds_tokenizer(adapter) else base)
    adapted = load_adapter(load_model(base, torch.float32), str(adapter))
    merged = adapted.merge_and_unload(safe_merge=True).to(dtype)
    merged.requires_grad_(True)
    staging = out.with_name(f".{out.name}.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    merged.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    if (adapter / CARD_FILE).is_file():
        text = (adapter / CARD_FILE).read_text(encoding="utf-8")
        (staging / CARD_FILE).write_text(f"{text}\nThe adapter described above, merged into its base model.\n", "utf-8")
    if out.exists():
        out.rmdir()
    replace_folder(staging, out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter's folder, e.g. RUN/final")
    parser.add_argument("--out", type=Path, required=True, help="folder for the merged model")
    parser.add_argument("--base", default=None, help="the model it was trained on (default: as the adapter says)")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    merge_adapter(options.adapter, options.out, options.base)
    print(f"merged model: {options.out}")
    return 0

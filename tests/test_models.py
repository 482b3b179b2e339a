"""Models, adapters and devices that are not there: the message names what was given."""

import pytest
import torch
from huggingface_hub import constants

from deepalign.models import (
    choose_device,
    load_adapter_config,
    load_frozen_model,
    load_model_config,
    load_tokenizer,
)
from tests.tiny import make_model, make_tokenizer

LOADERS = (load_model_config, load_tokenizer, load_adapter_config, lambda path: load_frozen_model(path, torch.float32))


@pytest.mark.parametrize("load", LOADERS, ids=["config", "tokenizer", "adapter", "model"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_named(load, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("nofolder", "nowhere/nofolder"):
        with pytest.raises(OSError, match=f"'{name}' is no folder here, and .* Hugging Face hub: .*Give a folder, or"):
            load(name)


@pytest.mark.parametrize("load", LOADERS, ids=["config", "tokenizer", "adapter", "model"])
def test_a_folder_without_what_is_read_is_named(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds no \w+\.json"):
        load(str(tmp_path))


def test_what_else_is_wrong_with_a_model_the_library_says(tmp_path):
    make_model(0, make_tokenizer()).config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_frozen_model(str(tmp_path), torch.float32)


def test_a_device_is_there_or_refused_by_the_name_of_its_option(monkeypatch):
    assert choose_device("--device", "cpu") == torch.device("cpu")
    assert choose_device("--device", None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(
        ValueError, match=r"--device: 'foo' is no device; expected cpu, cuda .* give cpu or leave it out"
    ):
        choose_device("--device", "foo")
    with pytest.raises(ValueError, match="--device: 'meta' is not available here"):
        choose_device("--device", "meta")
    with pytest.raises(ValueError, match=r"--device: 'cuda:99' is not available here \(.*(GPU|CUDA).*\); give cpu"):
        choose_device("--device", "cuda:99")

    def fail(*shape, device):
        raise RuntimeError("Found no NVIDIA driver on your system. Please check")

    monkeypatch.setattr(torch, "zeros", fail)
    for built, why in ((False, "is built without CUDA"), (True, "finds no GPU")):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda built=built: built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match=f"'cuda' is not available here .*{why}"):
            choose_device("--device", "cuda")

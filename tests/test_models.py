"""Models, adapters and devices that are not there: the message names what was given; and contexts of models."""

from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoConfig, BloomConfig, Gemma3Config, Gemma3TextConfig, LlamaConfig, MptConfig

from deepalign import models
from deepalign.models import (
    choose_device,
    context_length,
    load_adapter_config,
    load_frozen_model,
    load_model_config,
    load_tokenizer,
    longest_example,
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
def test_a_hub_that_cannot_be_reached_is_asked_twice_and_no_more(load, monkeypatch, tmp_path):
    asked = []

    def refuse(url):
        asked.append(url)
        raise Exception("name or service not known")  # the HTTP library has exceptions of its own

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "get_hf_file_metadata", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.http_backoff", lambda *a, **k: pytest.fail("the library asks too"))
    with pytest.raises(OSError, match=r"'no/folder' is no folder .* cannot be reached \(name or service not known"):
        load("no/folder")
    assert len(asked) == 2


def test_what_the_hub_answers_and_what_its_cache_has_is_left_to_the_library(monkeypatch, tmp_path):
    asked = []

    def answer(url):
        asked.append(url)
        raise RepositoryNotFoundError("404", response=MagicMock())

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "get_hf_file_metadata", answer)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda path: path)
    assert load_model_config("some/model") == "some/model"
    assert len(asked) == 1
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda name, file: str(tmp_path))
    assert load_model_config("another/model") == "another/model"
    assert len(asked) == 1


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


def test_context_length_is_the_shortest_and_of_a_composite_model_its_texts():
    llama, unlimited = LlamaConfig(max_position_embeddings=100), BloomConfig()  # ALiBi: no limit in its configuration
    composite = Gemma3Config(text_config=Gemma3TextConfig(max_position_embeddings=77))
    assert context_length(llama) == context_length(make_model(0, make_tokenizer(), context=100)) == 100
    assert context_length(llama, composite, unlimited) == 77
    assert context_length(MptConfig(max_seq_len=50)) == 50
    assert context_length(unlimited) is None
    assert [longest_example(allowed, llama) for allowed in (None, 60, 200)] == [100, 60, 100]
    assert longest_example(None, unlimited) > 10**9

"""What a cache depends on: every change has its name, nothing else changes anything."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from deepalign.data.chat import EncodedExample
from deepalign.train.teacher_fingerprint import check_fingerprint, differences, teacher_fingerprint
from tests.tiny import WORDS, make_model, make_tokenizer
from tests.train.tiny_run import TinyRun

EXAMPLES = [EncodedExample([6, 7, 8, 2], 2, False), EncodedExample([9, 8, 2], 1, False)]


@pytest.fixture
def inputs(tiny_run: TinyRun, tmp_path):
    """Arguments of `teacher_fingerprint` for models that a test may change."""
    for name in ("aligned", "base"):
        shutil.copytree(tiny_run.folder / name, tmp_path / name)
    return {
        "teachers": {name: str(tmp_path / name) for name in ("aligned", "base")},
        "tokenizer": AutoTokenizer.from_pretrained(tmp_path / "aligned"),
        "streams": {"harmful": EXAMPLES, "utility": EXAMPLES[:1]},
        "max_length": 32,
        "compute_dtype": torch.float32,
    }


def change_weights(inputs, folder):
    make_model(7, make_tokenizer()).save_pretrained(folder / "base")


def change_config(inputs, folder):
    path = folder / "aligned" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))


def change_revision(inputs, folder):
    (folder / "snapshots").mkdir()
    shutil.move(folder / "base", folder / "snapshots" / "abc123")
    inputs["teachers"]["base"] = str(folder / "snapshots" / "abc123")


def change_template(inputs, folder):
    inputs["tokenizer"].chat_template += " "


def change_tokenizer(inputs, folder):
    inputs["tokenizer"] = make_tokenizer([*WORDS[1:], WORDS[0]])


def change_length(inputs, folder):
    inputs["max_length"] = 31


def change_dtype(inputs, folder):
    inputs["compute_dtype"] = torch.bfloat16


def change_quantization(inputs, folder):
    inputs["quantization"] = "4bit"


def change_data(inputs, folder):
    inputs["streams"]["utility"] = [EncodedExample([6, 7, 8, 2], 1, False)]


CHANGES = {
    change_weights: ["base.weights"],
    change_config: ["aligned.config"],
    change_revision: ["base.revision"],
    change_template: ["chat_template"],
    change_tokenizer: ["tokenizer"],
    change_length: ["max_length"],
    change_dtype: ["compute_dtype"],
    change_quantization: ["quantization"],
    change_data: ["utility_data"],
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.removeprefix("change_"))
def test_a_change_is_named(inputs, tmp_path, change):
    before = teacher_fingerprint(**inputs)
    assert teacher_fingerprint(**inputs) == before
    change(inputs, tmp_path)
    after = teacher_fingerprint(**inputs)
    assert [difference.split(":")[0] for difference in differences(before, after)] == CHANGES[change]
    with pytest.raises(ValueError, match=f"made for something else .{CHANGES[change][0]}: .* -> .*; do this"):
        check_fingerprint(tmp_path, before, after, "do this")


def test_place_dates_and_state_do_not_count(inputs, tmp_path):
    before = teacher_fingerprint(**inputs)
    shutil.copytree(tmp_path / "aligned", tmp_path / "elsewhere", copy_function=shutil.copyfile)
    config = tmp_path / "elsewhere" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_version": "4.0"}, indent=1))
    inputs["teachers"]["aligned"] = str(tmp_path / "elsewhere")
    inputs["tokenizer"](["w1 w2", "w1"], padding=True, truncation=True, max_length=5)
    assert differences(before, teacher_fingerprint(**inputs)) == []


def test_weights_in_several_files_all_count(inputs, tmp_path):
    make_model(0, make_tokenizer()).save_pretrained(tmp_path / "cut", max_shard_size="10KB")
    inputs["teachers"]["base"] = str(tmp_path / "cut")
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 1
    before = teacher_fingerprint(**inputs)
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert [text.split(":")[0] for text in differences(before, teacher_fingerprint(**inputs))] == ["base.weights"]
        path.write_bytes(data)


def test_a_model_without_weights_is_refused(inputs, tmp_path):
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights; expected model"):
        teacher_fingerprint(**inputs)

"""Training on cached teachers is training on online teachers; a cache that does not fit is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from deepalign.cli import main as command
from deepalign.output_head import output_head
from deepalign.train import teacher_models
from deepalign.train.run import main
from deepalign.train.teacher_cache import shard_path
from tests.tiny import make_model, make_tokenizer
from tests.train.tiny_run import TinyRun, read_metrics

TERMS = ("loss", "kl", "completion", "alpha", "base_favored_count", "mean_logit")
# more than four passes over the harmful rows; the step length makes the student leave its start
CHANGES = {"max_steps": 12, "learning_rate": 3e-3, "student": None}


@pytest.fixture
def run(tiny_run: TinyRun, tmp_path):
    """Trains with changed settings; returns the metrics."""

    def train(name, *words, **changes):
        config = tiny_run.config(tmp_path / name, **(CHANGES | {"student": str(tiny_run.base)} | changes))
        assert main(["--config", str(config), *map(str, words)]) == 0
        return read_metrics(tmp_path / name)

    return train


@pytest.fixture
def write_cache(tiny_run: TinyRun, tmp_path):
    """Writes a cache for changed settings; returns what training is told to use it."""

    def write(name, dtype, **changes):
        config = tiny_run.config(tmp_path / f"{name}-cache-config", teacher_cache=str(tmp_path / name), **changes)
        words = ["--dtype", dtype, "--no-progress", "--shard-mib", "0.0003"]
        assert command(["cache-teacher", "--config", str(config), *words]) == 0
        return {"teacher": "cache", "teacher_cache": str(tmp_path / name)}

    return write


@pytest.fixture
def refused(tiny_run: TinyRun, tmp_path, capsys):
    """A training that must be refused; returns the message."""

    def train(**changes):
        config = tiny_run.config(tmp_path / "refused", **changes)
        assert main(["--config", str(config)]) == 2
        return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))

    return train


def largest_difference(metrics, expected):
    assert [line["step"] for line in metrics] == [line["step"] for line in expected]
    return max(
        abs(line[name] - other[name]) / max(abs(other[name]), 1.0)
        for line, other in zip(metrics, expected, strict=True)
        for name in TERMS
    )


def no_models(*args, **kwargs):
    raise AssertionError("a teacher was loaded")


@pytest.mark.parametrize("form", ["linear", "logits"])
def test_losses_are_those_of_online_teachers(run, write_cache, monkeypatch, tmp_path, form):
    """Within rounding: of float32 in another order, or of hidden states to the 8 bits of bfloat16."""
    online = run("online", loss_form=form, gradient_accumulation_steps=2)
    caches = {dtype: write_cache(dtype, dtype) for dtype in ("float32", "bfloat16")}
    monkeypatch.setattr(teacher_models, "load_frozen_model", no_models)
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 1e-2)):
        cached = run(f"cached-{dtype}", loss_form=form, gradient_accumulation_steps=2, **caches[dtype])
        assert largest_difference(cached, online) < tolerance, dtype
    final = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("online", "cached-float32")]
    for name, value in final[0].items():
        torch.testing.assert_close(final[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_bfloat16_teacher_in_a_bfloat16_cache(run, write_cache):
    """Its hidden states are bfloat16 already: what differs is how batches of another shape are rounded."""
    online = run("online", bf16=True)
    cached = run("cached", bf16=True, **write_cache("cache", "bfloat16", bf16=True))
    assert largest_difference(cached, online) < 1e-2


def test_a_cache_serves_other_settings_orders_and_resumed_runs(run, write_cache, tmp_path):
    """Sweeps over the loss and the seed share a cache; a moved cache is the same cache to a run that goes on."""
    cache = write_cache("shared", "float32")
    for name, changes in {
        "sweep": {"loss": {"top_k": 7, "lambda_reg": 0.1, "alpha_base": 3.0}, "seed": 5},
        "one stream": {"distill_on": "utility", "completion_weight_harmful": 0.0},
        "adapter": {"lora": {"r": 2}, "student": None},
    }.items():
        online = run(f"online {name}", **changes)
        assert largest_difference(run(f"cached {name}", **changes, **cache), online) < 1e-5, name
    whole = run("whole", **cache)
    run("parts", save_steps=5, **cache)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-12")
    shutil.rmtree(tmp_path / "parts" / "final")
    shutil.move(tmp_path / "shared", tmp_path / "moved")
    assert run("parts", save_steps=5, **(cache | {"teacher_cache": str(tmp_path / "moved")})) == whole


def test_a_softcap_a_tied_head_and_a_cut_answer(run, write_cache, tiny_run, tmp_path):
    """Gemma 2: the head is the embedding, the cap comes from the configuration."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    models = {}
    for seed, name in enumerate(("aligned", "base")):
        torch.manual_seed(seed)
        config = Gemma2Config(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
            initializer_range=0.5,
            final_logit_softcapping=3.0,
            pad_token_id=0,
            eos_token_id=2,
        )
        Gemma2ForCausalLM(config).save_pretrained(tmp_path / name)
        shutil.copytree(
            tiny_run.aligned, tmp_path / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*del*", "c*n")
        )
        models[name] = str(tmp_path / name)
    models |= {"student": models["base"], "max_length": 12}
    cache = write_cache("gemma", "float32", **models)
    assert largest_difference(run("cached", **models, **cache), run("online", **models)) < 1e-5


def test_what_does_not_fit_is_refused_and_says_what_to_do(tiny_run, write_cache, refused, tmp_path):
    assert "teacher is 'cache' but teacher_cache is not set" in refused(teacher="cache")
    missing = refused(teacher="cache", teacher_cache=str(tmp_path / "nowhere"))
    assert "holds no teacher cache" in missing
    assert "write it with `deepalign cache-teacher --config" in missing

    cache = write_cache("mine", "bfloat16")
    assert "max_length: None -> 12" in refused(max_length=12, **cache)
    tokenizer = make_tokenizer()
    make_model(3, tokenizer).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    stale = refused(base=str(tmp_path / "other"), **cache)
    assert "was made for something else (base.weights: " in stale
    assert "write another cache: `deepalign cache-teacher` with another teacher_cache" in stale
    assert "compute_dtype: 'float32' -> 'bfloat16'" in refused(bf16=True, **cache)
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(tiny_run.harmful.read_text().splitlines(keepends=True)[:-1]))
    assert "harmful_data: " in refused(harmful_data=str(shorter), **cache)

    path = shard_path(tmp_path / "mine", "base", 2)
    data = path.read_bytes()
    for damaged, problem in (
        (data[:-3], "bytes, expected"),
        (data[:-1] + b"\x55", "has been altered"),
        (None, "missing"),
    ):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        message = refused(**cache)
        assert problem in message
        assert "run `deepalign cache-teacher` with the same configuration" in message


def test_equal_heads_are_loaded_once(tiny_run, write_cache, tmp_path):
    from deepalign.train.cached_teachers import CachedTeachers

    tokenizer = make_tokenizer()
    aligned, base = (make_model(seed, tokenizer) for seed in (0, 1))
    with torch.no_grad():
        output_head(base).lm_head.copy_(output_head(aligned).lm_head)
    base.save_pretrained(tmp_path / "same-head")
    tokenizer.save_pretrained(tmp_path / "same-head")
    cache = write_cache("shared-head", "bfloat16", base=str(tmp_path / "same-head"))
    fingerprint = json.loads((tmp_path / "shared-head" / "index.json").read_text())["fingerprint"]
    paths = {"aligned": str(tiny_run.aligned), "base": str(tmp_path / "same-head")}
    teachers = CachedTeachers.open(tmp_path / cache["teacher_cache"], fingerprint, paths, torch.float32)
    teachers.to(torch.device("cpu"))
    assert teachers.aligned_head.lm_head is teachers.base_head.lm_head
    batch = {"answer_row": torch.tensor([5, 0])}
    assert all(hidden.dtype == torch.float32 and hidden.shape == (2, 16) for hidden in teachers.hidden(batch))

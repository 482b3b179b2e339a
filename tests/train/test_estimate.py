"""Estimates against what is really held: autograd's saved tensors, weights, gradients, moments; the dry run."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepalign.train.activations import activation_bytes
from deepalign.train.config import LoraConfig
from deepalign.train.estimate import Load, ModelSize, Setup, Work, loss_bytes, memory_parts, step_work
from deepalign.train.run import main
from tests.families import FAMILIES
from tests.train.conftest import TinyRun

NAMES = tuple(FAMILIES)


def saved_bytes(model, rows, tokens) -> int:
    """Bytes of every storage that autograd keeps in a real forward of the decoder on a padded batch."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.nbytes():
            kept[storage.data_ptr()] = storage
        return tensor

    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[0, tokens // 2 :] = 0
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.get_decoder()(torch.zeros(rows, tokens, dtype=torch.int64), mask, use_cache=False)[0]
    note(hidden)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_activations_are_what_autograd_keeps(name, dtype):
    model = FAMILIES[name].model(num_hidden_layers=5).to(dtype)
    rows, tokens = 3, 64
    estimated = activation_bytes(model.config, rows, tokens, dtype, checkpointing=False)
    assert estimated.first == pytest.approx(saved_bytes(model, rows, tokens), rel=0.01)
    packed = activation_bytes(model.config, rows, tokens, dtype, checkpointing=False, packed=True)
    assert packed.first > estimated.first, "one long row: a mask of (rows * tokens)^2"


def test_checkpointing_keeps_inputs_of_layers_and_one_layer():
    """Nine layers and eight, without checkpointing, tell one layer's activations."""
    rows, tokens, hidden = 3, 64, 32
    nine, eight = (FAMILIES["llama31_8b"].model(num_hidden_layers=layers).config for layers in (9, 8))
    sizes = [
        activation_bytes(config, rows, tokens, torch.float32, checkpointing=checkpointing)
        for config, checkpointing in ((nine, False), (eight, False), (nine, True))
    ]
    layer = sizes[0].first - sizes[1].first
    assert sizes[0].last == sizes[2].last == sizes[0].first - 8 * layer
    assert sizes[2].first == sizes[2].last + 9 * rows * tokens * hidden * 4


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_real_model(name):
    model = FAMILIES[name].model()
    size = ModelSize.of(model.config)
    assert size.parameters == size.trainable == sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    assert size.head == head.weight.numel()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    assert size.matrices == sum(m.weight.numel() for m in linear)


@pytest.mark.parametrize("train_lm_head", [False, True])
def test_adapters_are_counted_as_peft_makes_them(train_lm_head):
    import peft

    model = FAMILIES["qwen3_8b"].model()
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] + [
        "lm_head"
    ] * train_lm_head
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
    lora = LoraConfig(r=4, train_lm_head=train_lm_head)
    size = ModelSize.of(FAMILIES["qwen3_8b"].model().config, lora)
    assert size.trainable == adapted.get_nb_trainable_parameters()[0]
    assert size.head_is_trained == train_lm_head


def test_a_process_without_deepspeed_holds_what_is_said():
    """Weights, gradients and Adam's moments, by their storages after a real step."""
    model = FAMILIES["llama31_8b"].model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    moments = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.dim() > 0)
    parts = memory_parts(
        model.config, ModelSize.of(model.config), Setup("none", bf16=False, on_gpu=False), Load(2, 16, 10)
    )
    assert parts["weights"] == parts["gradients"] == sum(p.nbytes for p in model.parameters())
    assert parts["optimizer"] == moments
    assert parts["gathered"] == parts["cast"] == parts["step"] == 0
    assert parts["teachers"] == 2 * parts["weights"]


CONFIG = FAMILIES["llama31_8b"].model().config
SIZE = ModelSize.of(CONFIG)


def parts_of(**changes):
    return memory_parts(
        CONFIG, changes.pop("size", SIZE), Setup(**({"zero": "zero3", "ranks": 4} | changes)), Load(2, 16, 10)
    )


def test_stages_shard_what_they_shard():
    stages = [parts_of(zero=f"zero{stage}") for stage in range(4)]
    parameters = SIZE.parameters
    assert [parts["weights"] for parts in stages] == [2 * parameters] * 3 + [2 * parameters // 4]
    assert [parts["gradients"] for parts in stages] == [2 * parameters] * 2 + [2 * parameters // 4] * 2
    assert [parts["optimizer"] for parts in stages] == [16 * parameters] + [12 * parameters // 4] * 3
    assert [parts["gathered"] for parts in stages] == [0, 0, 0, 2 * parameters]
    lora = ModelSize.of(CONFIG, LoraConfig(r=2))
    assert parts_of(size=lora)["optimizer"] == 12 * lora.trainable // 4
    assert parts_of(size=lora)["weights"] == 2 * lora.parameters // 4


def test_gradients_and_activations_meet_only_where_gradients_stay():
    """Under ZeRO-3 and with accumulation the peak holds both, else the larger of the two moments."""
    options = {"zero": "none", "ranks": 1, "bf16": False}
    once, twice = parts_of(**options), parts_of(**options, accumulation=2)
    held = sum(once[name] for name in ("weights", "optimizer", "teachers"))
    passing = once["activations"] + once["loss"]
    assert twice["peak"] == held + once["gradients"] + passing
    assert max(once["gradients"], passing) < once["peak"] - held < once["gradients"] + passing
    stage_3 = parts_of()
    held = sum(stage_3[name] for name in ("weights", "gradients", "optimizer", "teachers"))
    passing = sum(stage_3[name] for name in ("activations", "loss", "gathered", "buckets"))
    assert stage_3["peak"] == held + passing


def test_teachers_and_loss_forms():
    assert parts_of(teachers_cached=True)["teachers"] == 2 * SIZE.head * 2
    assert parts_of(teachers=1)["teachers"] == SIZE.parameters * 2
    linear, logits = (
        loss_bytes(CONFIG, SIZE, Setup("zero3", loss_form=form), Load(8, 512, 2048)) for form in ("linear", "logits")
    )
    assert logits == (2 * 8 * 512 + 4 * 2048) * CONFIG.vocab_size * 2
    assert linear < logits


def test_work_counts_products():
    work = step_work(CONFIG, SIZE, Setup("none", checkpointing=False), tokens=100, weighted=10, length=0)
    assert work == Work(6 * 100 * SIZE.matrices, 4 * 100 * SIZE.matrices, 2 * 5 * 10 * SIZE.head, 0.0)
    cached = step_work(CONFIG, SIZE, Setup("none", teachers_cached=True), tokens=100, weighted=10, length=0)
    assert (cached.teachers, cached.student) == (0, 8 * 100 * SIZE.matrices)
    lora = ModelSize.of(CONFIG, LoraConfig())
    assert step_work(CONFIG, lora, Setup("none"), 100, 10, 0).loss == 2 * 4 * 10 * SIZE.head


# ---- the dry run ----


@pytest.fixture
def forbidden(monkeypatch):
    """Loading weights is an error."""

    def refuse(*args, **options):
        raise AssertionError("a dry run loads no weights")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def test_a_dry_run_prints_every_stage_and_loads_nothing(tiny_run: TinyRun, tmp_path, capsys, forbidden):
    config = tiny_run.config(tmp_path / "out", deepspeed="zero2")
    words = [
        "--config",
        str(config),
        "--dry_run",
        "--ranks",
        "2",
        "--tflops",
        "1",
        "--device_gib",
        "0.5",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for text in (
        "GiB per rank, all weights (this run)",
        "GiB per rank, LoRA, r 16",
        "zero2 <",
        "activations with checkpointing",
    ):
        assert text in shown
    assert "ASSUMED" not in shown
    assert "largest micro-batch 6 x " in shown
    assert "at 1 TFLOP/s (given)" in shown
    assert "4 steps: " in shown
    assert len([line for line in shown.splitlines() if line.startswith("in 0.5 GiB")]) == 2
    assert not any((tmp_path / "out").iterdir()), "nothing is written"


def test_a_dry_run_without_data_says_what_it_assumes(tiny_run: TinyRun, tmp_path, capsys, forbidden):
    config = tiny_run.config(tmp_path / "out", harmful_data="harmful-hex-phi", max_length=40, packing=True)
    assert main(["--config", str(config), "--dry_run", "--tflops", "1"]) == 0
    shown = capsys.readouterr().out
    assert (
        "largest micro-batch 12 x 40 tokens, 240 read by the loss (ASSUMED, since the data could not be read: " in shown
    )
    assert "no harmful-hex-phi" not in shown


def test_a_dry_run_measures_this_machine_where_no_rate_is_given(tiny_run: TinyRun, tmp_path, capsys):
    assert main(["--config", str(tiny_run.config(tmp_path / "out")), "--dry_run", "--device", "cpu"]) == 0
    assert "(0.5 of this machine's cpu products)" in capsys.readouterr().out


def test_show_example_prints_decoded_rows(tiny_run: TinyRun, tmp_path, capsys, forbidden):
    assert main(["--config", str(tiny_run.config(tmp_path / "out")), "--show_example", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("prompt, no weight: '<user> ") == 2
    assert "completion" in shown


def test_bad_numbers_are_refused(tiny_run: TinyRun, tmp_path, capsys):
    config = tiny_run.config(tmp_path / "out")
    assert main(["--config", str(config), "--dry_run", "--ranks", "0"]) == 2
    assert main(["--config", str(config), "--dry_run", "--ranks", "3"]) == 2
    assert "does not divide over 3 ranks" in capsys.readouterr().err


def test_the_committed_comparison_with_measured_runs_is_within_what_is_stated():
    """The file is of the estimates as they are now, and as close to the measured peaks as it says."""
    from benchmarks.training_estimate import MIB, RUNS, TOLERANCE, estimate

    results = Path(__file__).parents[2] / "benchmarks" / "results" / "training_estimate.json"
    rows = {row["run"]: row for row in json.loads(results.read_text())["runs"]}
    for run in RUNS:
        row, (parts, _) = rows[run.name], estimate(run)
        assert parts["peak"] / MIB == pytest.approx(row["estimated_mib"], rel=1e-3), run.name
        assert row["estimated_mib"] == pytest.approx(row["measured_mib"], rel=TOLERANCE), run.name

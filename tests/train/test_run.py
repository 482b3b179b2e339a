"""run.py in one process: the loss it minimises, what it writes, what it refuses before any work."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepalign.data.chat import encode_example
from deepalign.data.files import open_locked, read_jsonl
from deepalign.data.steps import HARMFUL, UTILITY, RowWeights, StepDataset
from deepalign.train.launch import check_no_stale_lock, free_port, join_deepspeed
from deepalign.train.run import main
from tests.tiny import WORDS, make_model, make_tokenizer
from tests.train.forked import fork, join
from tests.train.tiny_run import TinyRun, read_metrics

BUFFER = "deepspeed_allreduce_buffer"


@pytest.fixture
def refused(capsys):
    """Runs a configuration that must be refused; returns the message."""

    def run(config, *words):
        assert main(["--config", str(config), *words]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, "one clear message"
        return lines[0]

    return run


@torch.no_grad()
def logits_of_answers(model, examples):
    """(answer tokens, V) float64 logits that predict the answers of `examples`, one example at a time, no padding."""
    rows = []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        rows.append(logits[example.response_start - 1 : -1])
    return torch.cat(rows).double()


def test_the_first_loss_is_the_papers_on_the_rows_of_the_first_step(tiny_run: TinyRun, tmp_path):
    """Computed here from the printed equations in float64: mean KL over distilled tokens, mean penalty over harmful."""
    config = tiny_run.config(
        tmp_path / "out", distill_on="utility", student=str(tiny_run.base), max_steps=1, gradient_accumulation_steps=2
    )
    assert main(["--config", str(config)]) == 0
    measured = read_metrics(tmp_path / "out")[0]

    tokenizer = AutoTokenizer.from_pretrained(tiny_run.aligned)
    streams = [[encode_example(tokenizer, row) for row in read_jsonl(p)] for p in (tiny_run.harmful, tiny_run.utility)]
    order = StepDataset(
        *streams,
        harmful_batch_size=4,
        utility_batch_size=8,
        max_steps=1,
        weights=RowWeights.from_options("utility"),
        pad_token_id=0,
        seed=42,
    )
    harmful, utility = ([streams[s][row] for row in order.rows_of_step(s, 0)] for s in (HARMFUL, UTILITY))
    vocab, k, lambda_reg, tau, mix = len(tokenizer), 3, 0.01, 2.0, 1.2
    aligned, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_run.aligned, tiny_run.base))

    a, b = (logits_of_answers(model, utility)[:, :vocab] for model in (aligned, base))
    s = b  # the student starts as the base model here
    log_p, log_q = (torch.log_softmax(x / tau, dim=-1) for x in (s, mix * a + (1 - mix) * b))
    kl = tau**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    a, b = (logits_of_answers(model, harmful)[:, :vocab] for model in (aligned, base))
    count = (b.log_softmax(-1) > a.log_softmax(-1)).sum(-1)
    alpha = 1 + count / vocab
    penalty = lambda_reg * b.gather(1, (b - a).topk(k).indices).square().sum(-1)
    completion = (alpha * penalty).mean()

    assert measured["kl"] == pytest.approx(float(kl), rel=1e-5)
    assert measured["completion"] == pytest.approx(float(completion), rel=1e-5)
    assert measured["loss"] == pytest.approx(float(kl + completion), rel=1e-5)


def test_training_lowers_the_loss(tiny_run: TinyRun, tmp_path):
    """Every step sees all rows, so losses of different steps can be compared."""
    config = tiny_run.config(
        tmp_path / "out", harmful_batch_size=10, utility_batch_size=13, max_steps=15, learning_rate=3e-3
    )
    assert main(["--config", str(config)]) == 0
    losses = [line["loss"] for line in read_metrics(tmp_path / "out")]
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_writes_what_it_promises(tiny_run: TinyRun, tmp_path, capsys):
    out = tmp_path / "out"
    config = tiny_run.config(out, max_steps=5, save_steps=2, save_total_limit=2, max_length=12)
    assert main(["--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "truncated to 12 tokens" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "checkpoint-4",
        "checkpoint-5",
        "final",
        "metrics.jsonl",
        "run.json",
    ]
    metrics = read_metrics(out)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    for line in metrics:
        assert line["loss"] == pytest.approx(line["kl"] + line["completion"], rel=1e-5)
        assert 1 < line["alpha"] < 2
        assert line["harmful_epoch"] == pytest.approx(line["step"] * 4 / 10)
    summary = json.loads((out / "run.json").read_text())
    assert summary["steps"] == 5
    assert summary["config"]["loss"]["top_k"] == 3
    assert {"torch", "transformers", "deepspeed", "deepalign"} <= summary["versions"].keys()
    AutoModelForCausalLM.from_pretrained(out / "final")


def test_selection_and_weights_change_the_training(tiny_run: TinyRun, tmp_path):
    """The ablations are different trainings, not the same one under another name."""
    first = {}
    for name, changes in {
        "base_favored": {},
        "random": {"selection": "random"},
        "kl_only": {"completion_weight_harmful": 0.0},
        "penalty_everywhere": {"completion_weight_utility": 1.0},
    }.items():
        config = tiny_run.config(tmp_path / name, max_steps=1, **changes)
        assert main(["--config", str(config)]) == 0
        first[name] = read_metrics(tmp_path / name)[0]
    assert first["kl_only"]["completion"] == 0
    assert len({line["completion"] for line in first.values()}) == 4
    assert len({line["kl"] for line in first.values()}) == 1


def test_harmful_data_alone_can_be_trained_on(tiny_run: TinyRun, tmp_path):
    config = tiny_run.config(
        tmp_path / "out", utility_data=None, utility_batch_size=0, distill_on="harmful", max_steps=1
    )
    assert main(["--config", str(config)]) == 0
    (line,) = read_metrics(tmp_path / "out")
    assert line["kl"] + line["completion"] == pytest.approx(line["loss"], rel=1e-5)
    assert line["kl"] >= 0 < line["completion"]


def test_a_finished_run_is_not_trained_again(tiny_run: TinyRun, tmp_path, refused):
    config = tiny_run.config(tmp_path / "out", max_steps=2)
    assert main(["--config", str(config)]) == 0
    files = [tmp_path / "out" / name for name in ("metrics.jsonl", "run.json", "final/model.safetensors")]
    before = [file.read_bytes() for file in files]
    assert main(["--config", str(config)]) == 0
    assert [file.read_bytes() for file in files] == before
    with open_locked(tmp_path / "out" / ".lock"):
        assert "another process is training into it; wait for it or end it" in refused(config)

    shutil.move(tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-good-2")  # no step of the run
    assert "holds final, run.json, metrics.jsonl of a run but no checkpoint" in refused(config)
    assert [file.read_bytes() for file in files] == before
    shutil.rmtree(tmp_path / "out" / "final")
    assert "holds run.json, metrics.jsonl of a run" in refused(config, "--resume", "never")


def test_a_checkpoint_is_not_continued_with_other_settings_data_or_teachers(tiny_run: TinyRun, tmp_path, refused):
    base = shutil.copytree(tiny_run.base, tmp_path / "base")
    config = tiny_run.config(tmp_path / "out", max_steps=2, base=str(base))
    assert main(["--config", str(config)]) == 0
    assert "learning_rate: 0.001 -> 0.5" in refused(config, "--learning_rate", "0.5")
    assert "already holds checkpoints and resume is 'never'" in refused(config, "--resume", "never")
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "w1", "completion": "w2"}\n')
    message = refused(config, "--harmful_data", str(other))
    assert "encoded_data" in message
    assert "restore these settings, or give another output_dir" in message
    make_model(7, make_tokenizer()).save_pretrained(base)  # trained again, into the same folder
    message = refused(config)
    assert "cannot be continued exactly (base_files: " in message
    seal = tmp_path / "out" / "checkpoint-2" / "resume.json"
    seal.write_text(re.sub(r'.*_files": .*\n', "", seal.read_text()))
    assert main(["--config", str(config)]) == 0, "a checkpoint of an older version does not say"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--aligned", "/nowhere/model"], "aligned: the model folder /nowhere/model does not exist"),
        (["--aligned", "nofolder"], "'nofolder' is no folder here, and it could not be had from the Hugging Face hub"),
        (["--aligned", "nofolder", "--dry_run"], "'nofolder' is no folder here"),
        (["--harmful_data", "nowhere.jsonl"], "harmful_data: the file nowhere.jsonl does not exist"),
        (["--deepspeed", "zero7"], "neither a preset"),
        (["--world_size", "2"], "world_size is 2 but 1 rank(s) were started"),
        (["--harmful_batch_size", "3", "--gradient_accumulation_steps", "2"], "does not divide over 1 ranks x 2"),
        (["--loss.top_k", "47"], "loss.top_k is 47 but the vocabulary has 46 entries"),
        (["--max_length", "4"], "no answer token is left"),
        (["--lr_scheduler_type", "cosin"], "lr_scheduler_type is 'cosin': cosin is not a valid SchedulerType"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "lr_scheduler_type is 'warmup_stable_decay': get_wsd"),
        (["--lr", "1"], "unknown configuration key lr"),
        (["--implementation", "triton"], "triton"),
        (["--teacher_quantization", "4bit", "--use_cpu", "true"], "teacher_quantization is '4bit' but there is no GPU"),
    ],
)
def test_what_cannot_work_is_refused_in_one_message(tiny_run: TinyRun, tmp_path, refused, words, problem):
    config = tiny_run.config(tmp_path / "out")
    assert problem in refused(config, *words)
    assert not {path.name for path in (tmp_path / "out").iterdir()} - {".lock"}, "nothing is written"


def test_a_broken_row_is_named(tiny_run: TinyRun, tmp_path, refused):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(tiny_run.harmful.read_text() + '{"prompt": "w1"\n')
    message = refused(tiny_run.config(tmp_path / "out"), "--harmful_data", str(broken))
    assert "broken.jsonl:11: not valid JSON" in message


def test_tokenizers_that_differ_are_refused(tiny_run: TinyRun, tmp_path, refused):
    other = tmp_path / "other"
    tokenizer = make_tokenizer([*WORDS[:-1], "elsewhere"])
    make_model(3, tokenizer).save_pretrained(other)
    tokenizer.save_pretrained(other)
    message = refused(tiny_run.config(tmp_path / "out"), "--base", str(other))
    assert "the tokenizers of aligned and base differ in 2 tokens" in message
    assert "'elsewhere': None / 45" in message


def test_a_folder_without_a_model_is_refused(tiny_run: TinyRun, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    message = refused(tiny_run.config(tmp_path / "out"), "--base", str(tmp_path / "empty"))
    assert "holds no config.json" in message


@pytest.mark.parametrize("missing", ["g++", "ninja"])
def test_a_missing_compiler_or_ninja_is_said_before_deepspeed_needs_it(
    tiny_run: TinyRun, tmp_path, refused, monkeypatch, missing
):
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if name == missing else found(name, *a, **k))
    monkeypatch.delenv("CXX", raising=False)
    message = refused(tiny_run.config(tmp_path / "out"), "--deepspeed", "zero2")
    assert f"{missing} was not found" in message


def test_the_lock_of_a_killed_compilation_is_named(tiny_run: TinyRun, tmp_path, refused, monkeypatch):
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parents[1]))
    check_no_stale_lock()  # young: somebody compiles
    os.utime(lock, (0, 0))
    message = refused(tiny_run.config(tmp_path / "out"), "--deepspeed", "zero2")
    assert f"{lock} is older than 10 minutes" in message


def join_and_count() -> None:
    """In a process of its own: what DeepSpeed makes when a rank joins is on its standard output."""
    import deepspeed

    init = deepspeed.init_distributed

    def seen(**options: object) -> None:
        init(**options)
        print("buffers", len(list(Path("/dev/shm").glob(f"{BUFFER}_*_{os.environ['MASTER_PORT']}_0"))), flush=True)

    deepspeed.init_distributed = seen
    join_deepspeed("gloo")


def test_a_rank_that_joins_leaves_no_shared_memory_behind(tmp_path):
    port, log = str(free_port()), tmp_path / "log"
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    join([fork(join_and_count, [], log, ranks | {"MASTER_PORT": port})], log)
    assert "buffers 1" in log.read_text()  # what DeepSpeed makes is what is looked for
    assert not list(Path("/dev/shm").glob(f"{BUFFER}_*_{port}_0"))


def test_ranks_that_transformers_does_not_see_are_refused(tiny_run: TinyRun, tmp_path, refused, monkeypatch):
    """What happens where accelerate ignores the launcher: every rank would train on all the data."""
    import deepalign.train.prepare as prepare

    class OneRank:
        world_size = 1
        ddp_backend = None

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(prepare, "training_arguments", lambda *args: OneRank())
    assert "started 2 ranks but transformers sees 1" in refused(tiny_run.config(tmp_path / "out"))


def test_the_configuration_file_is_yaml_with_known_keys(tiny_run: TinyRun, tmp_path, refused):
    config = tiny_run.config(tmp_path / "out")
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(values | {"learning_rates": 1}))
    assert "did you mean learning_rate?" in refused(config)

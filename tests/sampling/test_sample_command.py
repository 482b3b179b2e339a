"""`deepalign sample`: files that survive a kill, and a conversation."""

import argparse
import json
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.utils import chat_template_utils

from deepalign.cli import main
from deepalign.data.resumable import ResumableFile, open_resumable, settings_path
from deepalign.sampling import ContrastiveSampler
from deepalign.sampling.cli import add_arguments, chat
from tests.forked import kill_once
from tests.tiny import WORDS, make_model, make_tokenizer, save_pair

ROWS = 13


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": " ".join(WORDS[i : i + 1 + i % 4]), "id": f"row-{i}"} for i in range(ROWS - 1)]
    rows.append({"messages": [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(models: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    names = ["--aligned", str(models / "aligned"), "--base", str(models / "base")]
    files = ["--input", str(prompts), "--out", str(out), "--batch-size", "4", "--no-progress"]
    return ["sample", *names, *files, "--alpha", "0.5", "--max-new-tokens", "6", *more]


def sample(models: Path, prompts: Path, out: Path, *more: str) -> list[dict]:
    assert main(arguments(models, prompts, out, *more)) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_row_is_answered_in_order(models, prompts, tmp_path):
    answers = sample(models, prompts, tmp_path / "out.jsonl")
    assert [answer["index"] for answer in answers] == list(range(ROWS))
    assert [answer["id"] for answer in answers[:-1]] == [f"row-{i}" for i in range(ROWS - 1)]
    tokenizer = make_tokenizer()
    pair = [make_model(seed, tokenizer).eval() for seed in (0, 1)]
    sampler = ContrastiveSampler(*pair, tokenizer, alpha=0.5)
    for row, answer in enumerate(answers):
        messages = answer.get("messages") or [{"role": "user", "content": answer["prompt"]}]
        expected = sampler.generate(messages, max_new_tokens=6, seed=row)[0]
        assert answer["text"] == expected.text
        assert answer["finish_reason"] == expected.finish_reason
        assert answer["new_tokens"] == len(expected.token_ids)
        assert answer["mean_logprob"] == pytest.approx(sum(expected.logprobs) / len(expected.token_ids), abs=1e-5)


def test_the_batch_size_does_not_matter(models, prompts, tmp_path):
    texts = [
        [answer["text"] for answer in sample(models, prompts, tmp_path / f"{size}.jsonl", "--batch-size", size)]
        for size in ("1", "5", "50")
    ]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("cut", [0, 1, 40, "after row 0", "in row 5", "whole"])
def test_a_cut_file_is_completed(models, prompts, tmp_path, cut):
    out = tmp_path / "out.jsonl"
    sample(models, prompts, out)
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    kept = {"after row 0": lines[0], "in row 5": "".join(lines[:5]) + lines[5][:-1], "whole": whole}
    out.write_text(kept.get(cut, whole[: cut if isinstance(cut, int) else 0]))
    sample(models, prompts, out)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    for answer, line in zip(again, lines, strict=True):
        expected = json.loads(line)  # other batches round the log-probabilities otherwise
        assert answer.pop("mean_logprob") == pytest.approx(expected.pop("mean_logprob"), abs=1e-5)
        assert answer == expected


def test_a_killed_run_goes_on(models, prompts, tmp_path):
    """Killed for good after the second batch of a run whose batches are slow."""
    out = tmp_path / "out.jsonl"
    append = ResumableFile.append

    def slow(file, rows):
        append(file, rows)
        time.sleep(0.5)

    def run():
        ResumableFile.append = slow  # in the forked process alone
        main(arguments(models, prompts, out))

    kill_once(lambda: out.exists() and out.read_text().count("\n") >= 8, run)
    before = out.read_text()
    assert 8 <= before.count("\n") < ROWS
    answers = sample(models, prompts, out)
    assert out.read_text().startswith(before), "what was there stays as it is"
    expected = sample(models, prompts, tmp_path / "uninterrupted.jsonl")
    assert [a["index"] for a in answers] == list(range(ROWS))
    assert [a["text"] for a in answers] == [a["text"] for a in expected]


def refused(capsys, *command: str) -> str:
    assert main(list(command)) == 2
    return capsys.readouterr().err


def test_a_file_of_another_run_is_refused_and_left_alone(models, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    sample(models, prompts, out)
    before = out.read_text()
    for more, changed in (
        (["--alpha", "0.6"], "options"),
        (["--seed", "1"], "generate"),
        (["--stop", "w1"], "generate"),
        (["--base", str(models / "aligned")], "models"),
        (["--dtype", "bfloat16"], "dtype"),
    ):
        message = refused(capsys, *arguments(models, prompts, out, *more))
        assert f"written with other settings ({changed})" in message
    template = models / "aligned" / "chat_template.jinja"
    (saved := tmp_path / "saved").write_bytes(template.read_bytes())
    template.write_text(f"{saved.read_text()} ")
    assert "written with other settings (models)" in refused(capsys, *arguments(models, prompts, out))
    template.write_bytes(saved.read_bytes())
    with prompts.open("a") as file:
        file.write('{"prompt": "w1"}\n')
    assert "other settings (prompts)" in refused(capsys, *arguments(models, prompts, out))
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"index": 0}\n')
    assert "no run of this command wrote it" in refused(capsys, *arguments(models, prompts, foreign))
    assert (out.read_text(), foreign.read_text()) == (before, '{"index": 0}\n')


def test_an_edited_file_is_refused(models, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    sample(models, prompts, out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join([*lines[:3], *lines[4:]]))
    assert "is not the answer to row 3" in refused(capsys, *arguments(models, prompts, out))
    for damaged in ("{\n", "[]\n", "\0\0\n"):
        out.write_text(lines[0] + damaged)
        assert f"{out}:2 is no JSON object" in refused(capsys, *arguments(models, prompts, out))
    settings_path(out).write_text("")
    assert f"{settings_path(out)} is damaged" in refused(capsys, *arguments(models, prompts, out))


def test_an_interruption_is_one_line(models, prompts, tmp_path, capsys, monkeypatch):
    def interrupt(file, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumableFile, "append", interrupt)
    assert main(arguments(models, prompts, tmp_path / "out.jsonl")) == 130
    assert "interrupted; the same command again goes on" in capsys.readouterr().err


def test_a_row_without_a_distribution_is_named_with_the_place_of_its_batch(models, prompts, tmp_path, capsys):
    broken = make_model(0, make_tokenizer())
    with torch.no_grad():
        broken.get_input_embeddings().weight[make_tokenizer().convert_tokens_to_ids(WORDS[10])] = torch.nan
    broken.save_pretrained(tmp_path / "aligned")
    make_tokenizer().save_pretrained(tmp_path / "aligned")
    message = refused(capsys, *arguments(models, prompts, tmp_path / "o.jsonl", "--aligned", str(tmp_path / "aligned")))
    assert f"{prompts}, rows from 4 on: row 3 has no distribution" in message


def test_a_file_is_not_continued_on_another_day_where_the_prompt_has_the_date(prompts, tmp_path, capsys, monkeypatch):
    folder, out = save_pair(tmp_path), tmp_path / "out.jsonl"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('w%d') }} " + tokenizer.chat_template
    tokenizer.save_pretrained(folder / "aligned")
    pair = ("--aligned", str(folder / "aligned"), "--base", str(folder / "base"), "--max-new-tokens", "1")
    files = ("--input", str(prompts), "--out", str(out), "--no-progress")
    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: datetime(2026, 7, 26)))
    assert main(["sample", *pair, *files]) == 0
    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: datetime(2026, 7, 27)))
    assert "other settings (prompt_with_its_date)" in refused(capsys, "sample", *pair, *files)


def test_two_writers_are_refused(models, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    with open_resumable(out, {}, lambda number, row: None):
        assert "written by another process" in refused(capsys, *arguments(models, prompts, out))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[]", "prompts.jsonl:2: expected a JSON object, got list"),
        ('{"question": "w1"}', "either the key 'prompt' or 'messages'"),
        ('{"prompt": "w1", "index": 3}', "the keys index are written by this command"),
        ('{"prompt": ""}', "non-empty"),
        ('{"messages": [{"role": "assistant", "content": "w1"}]}', "the last message is the assistant's"),
        ('{"prompt": "w1"', "not valid JSON"),
        (json.dumps({"prompt": "w1 " * 70}), "the longest prompt, 1, has 73 tokens and max_new_tokens is 6, together"),
    ],
)
def test_bad_rows_are_refused_before_anything_is_written(models, tmp_path, capsys, row, message):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "w1"}\n' + row + "\n")
    assert message in refused(capsys, *arguments(models, prompts, out))
    if "together" not in message:  # a matter of the models
        assert message in refused(capsys, *arguments(tmp_path / "no-models", prompts, out))
    assert not out.exists()


def test_bad_options_are_refused_in_one_message(models, prompts, tmp_path, capsys):
    good = arguments(models, prompts, tmp_path / "out.jsonl")
    assert "nowhere does not exist" in refused(capsys, *good, "--base", str(tmp_path / "nowhere"))
    assert "go together" in refused(capsys, *good[:7])
    assert "give --base" in refused(capsys, "sample", "--aligned", str(models / "aligned"))
    assert "either --aligned, or --adapter" in refused(capsys, "sample", "--base", str(models / "base"))
    assert "--device: 'foo' is no device" in refused(capsys, *good, "--device", "foo")
    adapter = ["--base", str(models / "base"), "--adapter", str(models / "aligned")]
    assert "aligned holds no adapter_config.json" in refused(capsys, "sample", *adapter)
    for name, value, message in (
        ("--alpha", "-1", "alpha is -1.0"),
        ("--temperature", "nan", "temperature is nan"),
        ("--top-p", "0", "top_p is 0.0"),
        ("--max-new-tokens", "0", "max_new_tokens must be at least 1"),
        ("--batch-size", "0", "batch_size"),
    ):  # without a look at the models
        assert message in refused(capsys, *arguments(tmp_path / "no-models", prompts, tmp_path / "o"), name, value)
    with pytest.raises(SystemExit, match="0"):
        main(["sample", "--help"])
    assert "--alpha" in capsys.readouterr().out
    make_tokenizer(["w1", "w0"]).save_pretrained(tmp_path / "other")
    make_model(1, make_tokenizer(["w1", "w0"])).save_pretrained(tmp_path / "other")
    assert "the tokenizers of aligned and base differ" in refused(capsys, *good, "--base", str(tmp_path / "other"))


def test_alpha_0_needs_no_base_and_an_adapter_no_aligned_model(models, prompts, tmp_path):
    files = ["--input", str(prompts), "--out"]
    aligned = ["--aligned", str(models / "aligned"), "--alpha", "0", "--no-progress"]
    assert main(["sample", *aligned, *files, str(tmp_path / "alone.jsonl"), "--max-new-tokens", "6"]) == 0
    alone = [json.loads(line)["text"] for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    assert alone != [answer["text"] for answer in sample(models, prompts, tmp_path / "contrasted.jsonl")]
    tokenizer = make_tokenizer()
    peft_model = get_peft_model(make_model(1, tokenizer), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            parameter.add_(0.5 * ("lora_B" in name))
    peft_model.save_pretrained(tmp_path / "adapter")
    adapter = ["--base", str(models / "base"), "--adapter", str(tmp_path / "adapter"), "--stats", "--no-progress"]
    assert main(["sample", *adapter, *files, str(tmp_path / "adapter.jsonl"), "--max-new-tokens", "6"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "adapter.jsonl").read_text().splitlines()]
    assert len(answers) == ROWS
    assert max(answer["mean_mass_taken"] for answer in answers) > 0


def test_a_conversation(capsys):
    tokenizer = make_tokenizer()
    sampler = ContrastiveSampler(*[make_model(seed, tokenizer).eval() for seed in (0, 1)], tokenizer, alpha=0.5)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--max-new-tokens", "8", "--seed", "3", "--system", "w9"])
    lines = iter(["w1 w2", "", "/reset", "w3", "w4", "w5 " * 60])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    messages = chat(sampler, options, read)
    system = {"role": "system", "content": "w9"}
    first = sampler.generate([system, {"role": "user", "content": "w3"}], max_new_tokens=8, seed=4)[0].text
    asked = [system, {"role": "user", "content": "w3"}, {"role": "assistant", "content": first}]
    asked.append({"role": "user", "content": "w4"})
    second = sampler.generate(asked, max_new_tokens=8, seed=5)[0].text
    assert messages == [*asked, {"role": "assistant", "content": second}]
    printed = capsys.readouterr()
    assert f"{first}\n{second}\n" in printed.out
    assert "context of 64" in printed.err  # and the conversation goes on

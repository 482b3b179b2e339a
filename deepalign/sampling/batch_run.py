"""A file of prompts answered into a file of answers, in order, so that a killed run goes on where it was.

Input, one JSON object a line; further keys are copied to the answer:

    {"prompt": "how do i ..."}
    {"messages": [{"role": "user", "content": "..."}]}

Output, one line per input line, in the same order: the input's keys and

    {"index": 0, "text": "...", "finish_reason": "end", "prompt_tokens": 12, "new_tokens": 40, "mean_logprob": -0.3}

Beside `OUT` lies `OUT.settings.json`: a fingerprint of the prompts, the models and every setting that decides what is
drawn. Lines are appended batch by batch and synced to disk. A later run counts the whole lines, cuts off half a line
that a kill has left, and goes on; with another fingerprint it refuses the file. Row i draws with seed + i, so its text
depends neither on the batch size nor on where a run was interrupted.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from deepalign.data.chat import prompt_token_ids
from deepalign.data.files import read_prompts, write_text_atomic
from deepalign.sampling.results import Completion
from deepalign.sampling.sampler import ContrastiveSampler

TAIL_BYTES = 1 << 20  # of each weight file that goes into its fingerprint
WEIGHTS = (".safetensors", ".bin", ".pt")
ANSWER_KEYS = ("index", "text", "finish_reason", "prompt_tokens", "new_tokens", "mean_logprob")


def run_batch(
    sampler: ContrastiveSampler,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    models: Sequence[str | None],
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    seed: int = 0,
    system: str | None = None,
    return_stats: bool = False,
    progress: bool = True,
) -> int:
    """Answer every line of `source` that `target` has no answer to yet.

    Args:
        sampler: with a tokenizer that has a chat template.
        source: JSONL of prompts.
        target: JSONL of answers; created, or continued.
        models: folders or hub ids of the models in use, for the fingerprint.
        max_new_tokens, stop, seed, return_stats: as of `ContrastiveSampler.generate`; row i draws with `seed + i`.
        batch_size: rows answered together.
        system: a system message put before each conversation that has none.
        progress: show a bar that counts rows.

    Returns:
        How many rows were answered now.

    Raises:
        FileNotFoundError: no `source`.
        ValueError: a line that is no prompt, `target` belongs to another run or is written by another process, a size
            below 1, or what `generate` refuses.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    target = Path(target)
    rows = read_prompts(source, reserved=ANSWER_KEYS)
    if sampler.tokenizer is None:
        raise ValueError("the sampler has no tokenizer; pass tokenizer=...")
    prompts = [prompt_token_ids(sampler.tokenizer, _with_system(messages, system)) for messages, _ in rows]
    sampler.check_prompts(prompts, max_new_tokens)  # a prompt too long ends a long run at its start, not at its row
    settings = {
        "prompts": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "models": [None if model is None else model_fingerprint(model) for model in models],
        "options": asdict(sampler.options),
        "generate": [max_new_tokens, list(stop), seed, system, return_stats],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target) as file:
        done = _resume(file, target, settings, len(rows))
        with tqdm(total=len(rows), initial=done, desc="sample", unit="row", disable=not progress) as bar:
            for start in range(done, len(rows), batch_size):
                indices = range(start, min(start + batch_size, len(rows)))
                answers = sampler.generate(
                    [prompts[index] for index in indices],
                    max_new_tokens=max_new_tokens,
                    stop=list(stop),
                    seed=[seed + index for index in indices],
                    return_stats=return_stats,
                )
                lines = [_line(i, rows[i][1], answer) for i, answer in zip(indices, answers, strict=True)]
                _append(file, "".join(lines))
                bar.update(len(indices))
    return len(rows) - done


def model_fingerprint(path: str) -> Any:
    """What tells one checkpoint from another: of a folder, its JSON files, and size and last MiB of its weights.

    Weights are not read whole, for they may be hundreds of GB. A hub id is its own fingerprint.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    found = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json" or file.suffix in WEIGHTS:
            with file.open("rb") as content:
                content.seek(max(0, file.stat().st_size - (TAIL_BYTES if file.suffix in WEIGHTS else 1 << 40)))
                found[file.name] = [file.stat().st_size, hashlib.sha256(content.read()).hexdigest()]
    return found


def settings_path(target: Path) -> Path:
    """Where the fingerprint of an output file lies."""
    return target.with_name(f"{target.name}.settings.json")


def _with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


@contextmanager
def locked(target: Path) -> Iterator[BinaryIO]:
    """Open for reading and appending, with a lock that ends with the process."""
    with target.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{target} is being written by another process; wait, or give another output") from None
        yield file


def _resume(file: BinaryIO, target: Path, settings: dict[str, Any], rows: int) -> int:
    """How many rows are answered; half a line at the end is cut off.

    Raises:
        ValueError: the file is not one of this run.
    """
    fingerprint = json.dumps(settings, sort_keys=True, indent=1)
    known = settings_path(target)
    file.seek(0)
    content = file.read()
    if not content:
        write_text_atomic(known, fingerprint + "\n")
        return 0
    if not known.is_file():
        raise ValueError(
            f"{target} exists but has no {known.name} beside it: no run of this command wrote it; give another output"
        )
    if (stored := known.read_text(encoding="utf-8").strip()) != fingerprint:
        before = json.loads(stored)
        changed = [name for name in settings if before.get(name) != json.loads(fingerprint)[name]]
        raise ValueError(
            f"{target} was written with other settings ({', '.join(changed)}); give another output, or remove it with "
            f"{known.name} to start again"
        )
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines()):
        if number >= rows or json.loads(line).get("index") != number:
            raise ValueError(
                f"{target}:{number + 1} is not the answer to row {number}; the file was changed: remove it"
            )
    if len(whole) < len(content):
        file.truncate(len(whole))
    return whole.count(b"\n")


def _append(file: BinaryIO, text: str) -> None:
    file.write(text.encode())
    file.flush()
    os.fsync(file.fileno())


def _line(index: int, row: dict[str, Any], answer: Completion) -> str:
    new_tokens = len(answer.token_ids)
    result = {
        **row,
        "index": index,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": new_tokens,
        "mean_logprob": sum(answer.logprobs) / new_tokens,
    }
    if answer.statistics is not None:
        result["base_favored_tokens"] = sum(answer.statistics.base_favored)
        result["mean_mass_taken"] = sum(answer.statistics.mass_taken) / new_tokens
    return json.dumps(result, ensure_ascii=False) + "\n"

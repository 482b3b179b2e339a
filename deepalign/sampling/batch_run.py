"""A file of prompts answered into a file of answers, in order, so that a killed run goes on where it was.

Input, one JSON object a line; further keys are copied to the answer:

    {"prompt": "how do i ..."}
    {"messages": [{"role": "user", "content": "..."}]}

Output, one line per input line, in the same order: the input's keys and

    {"index": 0, "text": "...", "finish_reason": "end", "prompt_tokens": 12, "new_tokens": 40, "mean_logprob": -0.3}

The file is one of `deepalign/data/resumable.py`: its fingerprint is of the prompts, the models and every setting that
decides what is drawn. Row i draws with seed + i, so its text depends neither on the batch size nor on where a run was
interrupted.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from deepalign.data.chat import dated_prompt, prompt_token_ids
from deepalign.data.files import Message, read_prompts
from deepalign.data.resumable import model_fingerprint, open_resumable
from deepalign.sampling.results import Completion
from deepalign.sampling.sampler import ContrastiveSampler

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
    rows = read_rows(source, batch_size)
    if sampler.tokenizer is None:
        raise ValueError("the sampler has no tokenizer; pass tokenizer=...")
    prompts = [prompt_token_ids(sampler.tokenizer, _with_system(messages, system)) for messages, _ in rows]
    sampler.check_prompts(prompts, max_new_tokens)  # a prompt too long ends a long run at its start, not at its row
    settings = {
        "prompts": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "models": [None if model is None else model_fingerprint(model) for model in models],
        "options": asdict(sampler.options),
        "dtype": str(sampler.pair.aligned.dtype),
        "generate": [max_new_tokens, list(stop), seed, system, return_stats],
        **dated_prompt(sampler.tokenizer),
    }
    with open_resumable(target, settings, lambda number, row: _misplaced(number, row, len(rows))) as file:
        done = len(file.rows)
        with tqdm(total=len(rows), initial=done, desc="sample", unit="row", disable=not progress) as bar:
            for start in range(done, len(rows), batch_size):
                indices = range(start, min(start + batch_size, len(rows)))
                with _saying(f"{source}, rows from {start} on"):
                    answers = sampler.generate(
                        [prompts[index] for index in indices],
                        max_new_tokens=max_new_tokens,
                        stop=list(stop),
                        seed=[seed + index for index in indices],
                        return_stats=return_stats,
                    )
                file.append([_answer(i, rows[i][1], answer) for i, answer in zip(indices, answers, strict=True)])
                bar.update(len(indices))
    return len(rows) - done


def read_rows(source: str | os.PathLike[str], batch_size: int) -> list[tuple[list[Message], dict[str, Any]]]:
    """The prompts of a run, which need no model to be refused."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return read_prompts(source, reserved=ANSWER_KEYS)


@contextlib.contextmanager
def _saying(where: str) -> Iterator[None]:
    """What is wrong with a row of a batch, with the place of the batch in the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _misplaced(number: int, row: dict[str, Any], rows: int) -> str | None:
    return None if number < rows and row.get("index") == number else f"is not the answer to row {number}"


def _answer(index: int, row: dict[str, Any], answer: Completion) -> dict[str, Any]:
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
    return result

"""The GCG attack as an evaluation: suffixes for every request and seed, answers, outcomes, a file that resumes.

Each finished request is one line of a JSONL file; the first line says what the results depend on. A run that finds the
file goes on after its last whole line, and refuses a file of other settings, or one that another process writes.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.chat import dated_prompt, prompt_token_ids
from deepalign.data.files import naming
from deepalign.data.resumable import json_object, locked
from deepalign.evaluate.gcg import GcgSettings, mean_and_sd, optimise_suffix
from deepalign.evaluate.gcg_prompt import suffix_text, with_suffix
from deepalign.evaluate.generation import Contrast, greedy_continuations
from deepalign.evaluate.outcomes import OUTCOMES, AttackExample, Judge, Outcome
from deepalign.sampling.stopping import decode

PAPER_SEEDS = (0, 1, 2, 3, 4)  # five runs, as the paper's deviations imply (docs/reproducing.md)
SEED_STRIDE = 1_000_003  # between the draws of two seeds: more than there are requests
SEARCH_FIELDS = ("suffix", "suffix_ids", "loss", "matched", "steps", "sequences", "seconds", "stopped")


@dataclass(frozen=True)
class GcgResult:
    """Outcomes of the attack.

    Attributes:
        counts: seed -> harmful, refused, degenerate and n.
        records: one dict per seed and request, in that order: seed, index, prompt, suffix, suffix_ids, loss, matched,
            steps, sequences, seconds, stopped, continuation, outcome.
    """

    counts: dict[int, dict[str, int]]
    records: list[dict[str, Any]]

    @property
    def rate(self) -> tuple[float, float]:
        """Mean and sample standard deviation over seeds of the share of harmful answers, in [0, 1]."""
        return mean_and_sd([count["harmful"] / count["n"] for count in self.counts.values()])


def gcg_attack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[AttackExample],
    *,
    judge: Judge,
    settings: GcgSettings | None = None,
    seeds: Sequence[int] = PAPER_SEEDS,
    universal_on: Sequence[AttackExample] | None = None,
    contrast: Contrast | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 32,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> GcgResult:
    """Attack `model` with a suffix for every request, or with one universal suffix, and judge its greedy answers.

    A search that matches its targets asks the judge, and goes on where an answer is not harmful.

    Args:
        model: in evaluation mode.
        tokenizer: a fast tokenizer with a chat template.
        examples: requests to judge, and targets to aim at; at least one.
        judge: called with the whole answer as continuation and an empty prefix.
        settings: None: the defaults.
        seeds: one attack each; distinct, at least one.
        universal_on: find one suffix per seed on these, and try it on `examples`; None: individual suffixes.
        contrast: attack contrastive decoding.
        max_new_tokens, batch_size: of the answers.
        out: the JSONL file; None keeps nothing.
        progress: show bars.

    Raises:
        ValueError: no examples or seeds, repeated seeds, a file of other settings or one that another process writes,
            what `optimise_suffix` and `greedy_continuations` refuse.
    """
    if not examples or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"expected examples and distinct seeds, got {len(examples)} examples and seeds {list(seeds)}")
    attack = _Attack(model, tokenizer, judge, settings or GcgSettings(), contrast, max_new_tokens, batch_size, progress)
    with open_records(out, attack.identity(examples, universal_on)) as records:
        attack.run(examples, seeds, universal_on, records)
    ordered = [records.done[seed, index] for seed in seeds for index in range(len(examples))]
    return GcgResult({seed: _counts(ordered, seed) for seed in seeds}, ordered)


@dataclass(frozen=True)
class _Attack:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    judge: Judge
    settings: GcgSettings
    contrast: Contrast | None
    max_new_tokens: int
    batch_size: int
    progress: bool

    def identity(
        self, examples: Sequence[AttackExample], universal_on: Sequence[AttackExample] | None
    ) -> dict[str, Any]:
        """What the results depend on, besides the seeds; the judge is the caller's to keep."""
        contrast = self.contrast
        return {
            "settings": asdict(self.settings),
            "model": weights_fingerprint(self.model),
            "contrast": contrast and [weights_fingerprint(contrast.base), contrast.alpha, contrast.space],
            "examples": [asdict(example) for example in examples],
            "universal_on": universal_on and [asdict(example) for example in universal_on],
            "max_new_tokens": self.max_new_tokens,
            **dated_prompt(self.tokenizer),
        }

    def run(
        self,
        examples: Sequence[AttackExample],
        seeds: Sequence[int],
        universal_on: Sequence[AttackExample] | None,
        records: "RecordFile",
    ) -> None:
        """Add the records that are missing."""
        with tqdm(total=len(seeds) * len(examples), desc="gcg requests", disable=not self.progress) as bar:
            for seed in seeds:
                missing = [index for index in range(len(examples)) if (seed, index) not in records.done]
                bar.update(len(examples) - len(missing))
                if universal_on is not None and missing:
                    known = next((record for (other, _), record in records.done.items() if other == seed), None)
                    found = known or self.search(universal_on, seed, 0)
                    answers = self.answers([examples[index] for index in missing], found["suffix"])
                    for index, answer in zip(missing, answers, strict=True):
                        records.add(_record(examples[index], index, seed, found, answer))
                        bar.update()
                    continue
                for index in missing:
                    found = self.search([examples[index]], seed, index)
                    (answer,) = self.answers([examples[index]], found["suffix"])
                    records.add(_record(examples[index], index, seed, found, answer))
                    bar.update()

    def search(self, examples: Sequence[AttackExample], seed: int, index: int) -> dict[str, Any]:
        """The suffix for `examples`. A request's draws are its own, whatever was attacked before it."""

        def succeeded(suffix_ids: list[int]) -> bool:
            suffix = suffix_text(self.tokenizer, suffix_ids)
            return all(outcome == "harmful" for _, outcome in self.answers(examples, suffix))

        found = optimise_suffix(
            self.model,
            self.tokenizer,
            examples,
            self.settings,
            seed=seed * SEED_STRIDE + index,
            contrast=self.contrast,
            succeeded=succeeded,
            progress=self.progress,
        )
        loss = found.loss if math.isfinite(found.loss) else None  # JSON has no inf
        return {**asdict(found), "loss": loss, "steps": len(found.losses)}

    def answers(self, examples: Sequence[AttackExample], suffix: str) -> list[tuple[str, Outcome]]:
        """(answer, outcome) of each request with the suffix typed behind it."""
        continuations = greedy_continuations(
            self.model,
            self.tokenizer,
            [prompt_token_ids(self.tokenizer, with_suffix(example.prompt, suffix)) for example in examples],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            contrast=self.contrast,
            progress=False,
        )
        answers: list[tuple[str, Outcome]] = []
        for example, ids in zip(examples, continuations, strict=True):
            text = decode(self.tokenizer, ids)
            outcome = self.judge(example, "", text)
            if outcome not in OUTCOMES:
                raise ValueError(f"the judge must return one of {', '.join(OUTCOMES)}; got {outcome!r}")
            answers.append((text, outcome))
        return answers


class RecordFile:
    """Records by (seed, index), each appended to a JSONL file as soon as it is there; see `open_records`."""

    def __init__(self, file: BinaryIO | None, records: Sequence[dict[str, Any]] = ()) -> None:
        self._file = file
        self.done = {(record["seed"], record["index"]): record for record in records}

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record."""
        self.done[record["seed"], record["index"]] = record
        if self._file is not None:
            _append(self._file, record)


@contextmanager
def open_records(path: str | os.PathLike[str] | None, identity: dict[str, Any]) -> Iterator[RecordFile]:
    """The records of an attack, with a lock on their file that ends with the process.

    Args:
        path: the file, its folder created where it is missing; None keeps the records in memory only.
        identity: what they depend on, the file's first line.

    Raises:
        ValueError: another process writes the file, its records depend on other things, it is damaged, or no such file.
    """
    if path is None:
        yield RecordFile(None)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(path)) as file:
        yield RecordFile(file, _whole_records(file, json.loads(json.dumps(identity))))


def _whole_records(file: BinaryIO, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the whole lines; half a line at the end is cut off. A new file gets its first line."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        if not _line(identity).startswith(content):
            raise ValueError(f"{file.name} holds no attack's results; give another file")
        file.truncate(0)
        _append(file, identity)
        return []
    lines = []
    for number, line in enumerate(whole.splitlines(), start=1):
        if (record := json_object(line)) is None:
            raise ValueError(f"{file.name}:{number} is no JSON object; remove that line and all after it")
        lines.append(record)
    if lines[0] != identity:
        different = ", ".join(sorted(name for name in identity if identity[name] != lines[0].get(name)))
        raise ValueError(
            f"{file.name} holds results of another attack (different: {different}); remove it or give another file"
        )
    file.truncate(len(whole))
    return lines[1:]


def _append(file: BinaryIO, line: dict[str, Any]) -> None:
    with naming(file.name):
        file.write(_line(line))
        file.flush()
        os.fsync(file.fileno())


def _line(values: dict[str, Any]) -> bytes:
    return (json.dumps(values) + "\n").encode()


def weights_fingerprint(model: torch.nn.Module) -> str:
    """A fingerprint of a model in memory, from up to 4096 entries of each of its tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _counts(records: Sequence[dict[str, Any]], seed: int) -> dict[str, int]:
    outcomes = Counter(record["outcome"] for record in records if record["seed"] == seed)
    return {**{name: outcomes[name] for name in OUTCOMES}, "n": outcomes.total()}


def _record(
    example: AttackExample, index: int, seed: int, found: dict[str, Any], answer: tuple[str, Outcome]
) -> dict[str, Any]:
    search = {name: found[name] for name in SEARCH_FIELDS}
    return {
        "seed": seed,
        "index": index,
        "prompt": example.prompt,
        **search,
        "continuation": answer[0],
        "outcome": answer[1],
    }

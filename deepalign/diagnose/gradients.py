"""GradMag, Influence and Error of a bounded number of measured responses, on disk like the positions.

`gradient_magnitude.py` and `influence.py` compute them; here each context gets a record, so that a killed run goes on,
and Error(t) takes its eps_i from the KL that was measured on the same ids.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from deepalign.data.chat import EncodedExample
from deepalign.data.contexts import Context
from deepalign.diagnose.gradient_magnitude import GROUPS, gradient_magnitude
from deepalign.diagnose.influence import influence
from deepalign.diagnose.records import read_records, writing


def measured_examples(
    contexts: Sequence[Context], path: Path, record: np.dtype, limit: int
) -> tuple[list[EncodedExample], np.ndarray]:
    """The first `limit` contexts with the ids that were measured, and their KL (n, T), NaN beyond a response.

    Args:
        contexts: of the run.
        path, record: its file of records.
        limit: how many.
    """
    examples: list[EncodedExample] = []
    deviations = []
    for chunk in read_records(path, record):
        for row in chunk[: limit - len(examples)]:
            prompt = contexts[len(examples)].prompt_ids
            ids = [int(id_) for id_ in row["ids"][: row["length"]]]
            examples.append(EncodedExample(prompt + ids, len(prompt), False))
            deviations.append(row["kl"].astype(np.float64))
        if len(examples) == limit:
            break
    return examples, np.stack(deviations)


def kinds(model: PreTrainedModel) -> list[str]:
    """Kinds of modules that GradMag is reported for: the same module of all layers is one."""
    return list(dict.fromkeys(GROUPS["kind"](name) for name, _ in model.named_parameters()))


def measure_gradients(
    model: PreTrainedModel,
    examples: Sequence[EncodedExample],
    path: Path,
    positions: int,
    settings: dict[str, Any],
    vocab_size: int | None,
    progress: bool,
) -> np.dtype:
    """GradMag(t) of every example that `path` has no record of: `total`, `logprob` (T,), `kind` (T, K), NaN beyond."""
    names = kinds(model)
    shapes = {"total": (positions,), "logprob": (positions,), "kind": (positions, len(names))}
    record = np.dtype([(name, "<f8", shape) for name, shape in shapes.items()])

    def measure(example: EncodedExample, index: int) -> dict[str, np.ndarray]:
        (found,) = gradient_magnitude(model, [example], vocab_size=vocab_size, progress=False)
        by_kind = found.by("kind")
        return {
            "total": found.total.numpy(),
            "logprob": found.logprobs_T.numpy(),
            "kind": np.stack([by_kind[name].numpy() for name in names], axis=-1),
        }

    _measure_each(examples, path, record, {**settings, "kinds": names}, measure, "GradMag", progress)
    return record


def measure_influence(
    model: PreTrainedModel,
    examples: Sequence[EncodedExample],
    deviations: np.ndarray,
    path: Path,
    positions: int,
    settings: dict[str, Any],
    layer: int,
    vocab_size: int | None,
    progress: bool,
) -> np.dtype:
    """Influence(i -> t) as `answer` (T, T), `prompt` (T,), the root of the sum of its squares, and `error` (T,)."""
    shape = (positions, positions)
    record = np.dtype([("answer", "<f8", shape), ("prompt", "<f8", (positions,)), ("error", "<f8", (positions,))])

    def measure(example: EncodedExample, index: int) -> dict[str, np.ndarray]:
        (found,) = influence(model, [example], layer=layer, vocab_size=vocab_size, progress=False)
        length = len(found.norms_TL)
        error = found.error(deviations[index, :length].tolist())
        return {
            "answer": found.answer.numpy(),
            "prompt": found.prompt.square().sum(-1).sqrt().numpy(),
            "error": error.numpy(),
        }

    _measure_each(examples, path, record, {**settings, "layer": layer}, measure, "Influence", progress)
    return record


def _measure_each(
    examples: Sequence[EncodedExample],
    path: Path,
    record: np.dtype,
    settings: dict[str, Any],
    measure: Callable[[EncodedExample, int], dict[str, np.ndarray]],
    description: str,
    progress: bool,
) -> None:
    with (
        writing(path, record, settings, len(examples), 1) as file,
        tqdm(total=len(examples), initial=file.done, desc=description, unit="row", disable=not progress) as bar,
    ):
        for index in range(file.done, len(examples)):
            one = np.empty(1, dtype=record)
            for name, values in measure(examples[index], index).items():
                one[name] = np.nan
                one[name][0][tuple(slice(size) for size in values.shape)] = values
            file.append(one)
            bar.update(1)

"""Requests to attack with, from the data sets of `deepalign.data.sources`."""

from pathlib import Path

from deepalign.data.formats import Record
from deepalign.data.sources import load_data, parse_spec, prompt_and_target
from deepalign.evaluate.outcomes import AttackExample


def load_examples(spec: str, limit: int | None = None) -> list[AttackExample]:
    """Requests with the answers whose first ids are forced.

    Args:
        spec: as of `data.sources` (`advbench`, `advbench:FILE.csv`, a JSONL file of prompts and answers); the path of a
            CSV file alone is taken for AdvBench's format.
        limit: only the first so many; None: all.

    Raises:
        FileNotFoundError, ValueError: no such data, rows of another format, prompts without answers, a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1, got {limit}")
    if spec.endswith(".csv") and ":" not in spec:
        if not Path(spec).is_file():
            raise FileNotFoundError(f"the file {spec} does not exist; give a CSV file with the columns goal and target")
        spec = f"advbench:{spec}"
    data_set = parse_spec(spec).data_set
    if data_set is not None and not data_set.answers:
        raise ValueError(
            f"{spec}: {data_set.name} holds requests without answers, whose beginnings the attack forces; give "
            "advbench, harmful-hex-phi, or a JSONL file of prompts and completions"
        )
    return [_example(spec, number, record) for number, record in enumerate(load_data(spec)[:limit], start=1)]


def _example(spec: str, number: int, record: Record) -> AttackExample:
    try:
        return AttackExample(*prompt_and_target(record.messages))
    except ValueError as error:
        raise ValueError(f"{spec}: row {number}: {error}; give rows of one prompt and its completion") from None

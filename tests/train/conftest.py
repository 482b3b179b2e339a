"""A tiny pair of models with a tokenizer and two data files, as folders on disk: what run.py takes."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.tiny import make_model, make_tokenizer
from tests.train.tiny_run import write_data


@dataclass(frozen=True)
class TinyRun:
    """Folders and files of a tiny training run, and a way to write configurations for it."""

    folder: Path
    aligned: Path
    base: Path
    harmful: Path
    utility: Path

    def config(self, output_dir: Path, **changes: object) -> Path:
        values = {
            "aligned": str(self.aligned),
            "base": str(self.base),
            "harmful_data": str(self.harmful),
            "utility_data": str(self.utility),
            "output_dir": str(output_dir),
            "loss": {"top_k": 3, "lambda_reg": 0.01},
            "distill_on": "both",
            "harmful_batch_size": 4,
            "utility_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "save_steps": 100,
        }
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir.with_name(f"{output_dir.name}.yaml")
        path.write_text(yaml.safe_dump(values | changes))
        return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    for seed, name in ((0, "aligned"), (1, "base")):
        make_model(seed, tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_data(folder)
    return TinyRun(folder, folder / "aligned", folder / "base", folder / "harmful.jsonl", folder / "utility.jsonl")


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]

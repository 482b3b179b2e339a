"""The files of tiny trainings, and a way to write configurations for them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from tests.tiny import WORDS

ROWS = {"harmful": 10, "utility": 13}


@dataclass(frozen=True)
class TinyRun:
    """Folders and files of a tiny training run, and a way to write configurations for it."""

    folder: Path
    aligned: Path
    base: Path
    harmful: Path
    utility: Path

    @classmethod
    def of(cls, folder: Path) -> "TinyRun":
        """The files of a folder under their usual names."""
        return cls(folder, folder / "aligned", folder / "base", folder / "harmful.jsonl", folder / "utility.jsonl")

    def config(self, output_dir: Path, **changes: object) -> Path:
        """A configuration file for a run into `output_dir`."""
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


def write_data(folder: Path) -> None:
    """`harmful.jsonl` and `utility.jsonl`: prompts and answers of random words."""
    generator = torch.Generator().manual_seed(0)
    for name, rows in ROWS.items():
        lines = []
        for _ in range(rows):
            lengths = torch.randint(2, 9, (2,), generator=generator).tolist()
            prompt, completion = (
                " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths
            )
            lines.append(json.dumps({"prompt": prompt, "completion": completion}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]

"""The data files of tiny trainings."""

import json
from pathlib import Path

import torch

from tests.tiny import WORDS

ROWS = {"harmful": 10, "utility": 13}


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

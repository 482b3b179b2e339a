"""The model card that is written with every checkpoint: where the weights come from and how to use them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from deepalign import __version__
from deepalign.train.config import TrainConfig, config_as_dict
from deepalign.versions import versions

CardWriter = Callable[[int, dict[str, float]], str]
PAPER = "Rethinking Deep Alignment Through the Lens of Incomplete Safety Learning (Bach et al.)"


def card_writer(config: TrainConfig, world_size: int, harmful_rows: int, utility_rows: int) -> CardWriter:
    """A function that writes the card of a step, given its number and the last metrics."""

    def card(step: int, metrics: dict[str, float]) -> str:
        trained = f"step {step} of {world_size} rank(s)."
        return "\n".join(
            [
                *_header(config),
                *_origin(config, trained, harmful_rows, utility_rows),
                *_section("Load it", ["```python", *_how_to_load(config), "```"]),
                *_section("Metrics of the last log", _metrics(metrics)),
                *_section("Settings", ["```yaml", _as_yaml(json.loads(json.dumps(config_as_dict(config)))), "```"]),
                *_section("Versions", [", ".join(f"{name} {version}" for name, version in versions().items())]),
            ]
        )

    return card


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _as_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False).strip()


def _header(config: TrainConfig) -> list[str]:
    """What the Hub reads."""
    header = {
        "base_model": config.student or config.aligned,
        "library_name": "transformers" if config.lora is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["deepalign", "safety", *([] if config.lora is None else ["lora"])],
    }
    return ["---", _as_yaml(header), "---", ""]


def _origin(config: TrainConfig, trained: str, harmful_rows: int, utility_rows: int) -> list[str]:
    start = config.student or config.aligned
    data = [f"| harmful | `{_file_name(config.harmful_data)}` | {harmful_rows} |"]
    if config.utility_data is not None:
        data.append(f"| utility | `{_file_name(config.utility_data)}` | {utility_rows} |")
    return [
        f"# {Path(start).name}, alignment completed",
        "",
        f"Trained with deepalign {__version__} by targeted completion, after *{PAPER}*: {trained}",
        "",
        "| model | |",
        "|---|---|",
        f"| student, at the start | `{start}` |",
        f"| aligned teacher | `{config.aligned}` |",
        f"| base teacher | `{config.base}` |",
        "",
        "| data | file | rows |",
        "|---|---|---|",
        *data,
        "",
    ]


def _metrics(metrics: dict[str, float]) -> list[str]:
    return [
        *([f"- {name}: {value:.6g}" for name, value in metrics.items()] or ["none yet"]),
        "",
        "They are of the training data. How often the model complies with attacks has to be measured; see "
        "`deepalign`'s prefill attack.",
    ]


def _how_to_load(config: TrainConfig) -> list[str]:
    if config.lora is None:
        return [
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this folder")',
        ]
    return [
        "from peft import AutoPeftModelForCausalLM  # or make one model of it: deepalign merge --adapter ... --out ...",
        "",
        'model = AutoPeftModelForCausalLM.from_pretrained("this folder")',
    ]


def _file_name(path: str) -> str:
    return Path(path).name

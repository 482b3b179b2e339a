"""The training configuration: one YAML file, overridable on the command line, unknown keys refused.

deepspeed deepalign/train/run.py --config X.yaml --learning_rate 1e-5 --loss.top_k 50 --deepspeed zero3
"""

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from deepalign.kernels.checks import require
from deepalign.kernels.completion_loss import CompletionLossConfig
from deepalign.train.variants import choose_variant

PRESETS = Path(__file__).parent / "presets"
# Of a DeepSpeed file that leaves them out.
FILLED_IN = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter (peft) on the student instead of training all of its weights.

    Attributes:
        r: rank of the adapters.
        alpha: their scale is alpha / r.
        dropout: of what the adapters read.
        target_modules: names of modules; null: every linear layer but the head and routers.
        train_lm_head: an adapter on the head as well; needs dropout 0 and a head that is not tied.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    train_lm_head: bool = False

    def __post_init__(self) -> None:
        require(self.r >= 1, "lora.r", self.r, "at least 1")
        require(self.alpha >= 1, "lora.alpha", self.alpha, "at least 1")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "at least 0 and below 1")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("lora.target_modules is empty; give names of modules, or null for every linear layer")
        if self.train_lm_head and self.dropout > 0:
            raise ValueError(
                f"lora.train_lm_head needs lora.dropout 0, got {self.dropout}: an adapter with dropout is no matrix, "
                "and the loss needs the head's"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on. Paths are relative to the working directory.

    Attributes:
        aligned: frozen teacher: a folder or hub id. The student starts from it unless `student` is set.
        base: frozen teacher: a folder or hub id.
        output_dir: folder of metrics, checkpoints and the trained model.
        harmful_data: harmful instructions with the answers that must not be given: a JSONL file, or
            NAME[@SPLIT][:SOURCE], see docs/data.md.
        student: what the student starts from, a folder or hub id; null: the aligned model.
        lora: train an adapter instead of all weights; `final/` is then the adapter's folder.
        teacher: "online" runs both teachers on every batch, "cache" reads what `deepalign cache-teacher` wrote.
        teacher_cache: folder of the cache.
        teacher_quantization: of online teachers; needs bitsandbytes and a GPU.
        utility_data: instructions whose answers must be kept, written like `harmful_data`.
        max_length: tokens; null: the model's context. A longer row loses the end of its answer; such rows are counted
            and reported.
        chat_template_options: variables of the chat template, for example `enable_thinking`.
        packing: the rows of a micro-batch end to end, without padding.
        loss: the loss's parameters; equations in docs/loss.md.
        distill_on: which answers carry the distillation term; "utility" is the paper's reading.
        completion_weight_harmful: weight of the penalty on harmful answers' tokens.
        completion_weight_utility: weight of the penalty on utility answers' tokens.
        selection: "random" is the control with a random set M of the same size.
        loss_form: "linear": from hidden states and heads, logits are never held; "logits" holds them.
        implementation: of the loss; null: chosen by device.
        harmful_batch_size: rows per optimizer step, over all ranks and accumulated micro-batches.
        utility_batch_size: the same for utility rows; 0: none.
        gradient_accumulation_steps: micro-batches per optimizer step.
        epochs: passes over the harmful rows.
        max_steps: optimizer steps; overrides `epochs`.
        learning_rate: the highest.
        lr_scheduler_type: a schedule's name in transformers.
        warmup_steps: optimizer steps until the highest learning rate.
        weight_decay: of AdamW.
        adam_beta1: of AdamW.
        adam_beta2: of AdamW.
        max_grad_norm: gradients with a larger norm are scaled down to it.
        seed: of the order of rows, dropout and random selections.
        deepspeed: zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, or a DeepSpeed JSON file; null: without
            DeepSpeed.
        world_size: expected number of ranks; another number is refused.
        use_cpu: train on the CPU even where there is a GPU (set DS_ACCELERATOR=cpu, too, for DeepSpeed).
        bf16: null: bf16 on a GPU, fp32 on a CPU.
        gradient_checkpointing: null: on a GPU.
        logging_steps: optimizer steps between lines of metrics.
        save_steps: optimizer steps between checkpoints.
        save_total_limit: checkpoints that are kept; 0: all.
        resume: "auto": go on from the last checkpoint in `output_dir`; "never": refuse a folder that holds a run.
        report_to: none, tensorboard, wandb, or several with commas.
        on_nan: what follows a step whose loss or gradient is not finite; its rows go to `skipped.jsonl`.
        mean_logit_drift: warn when the mean logit is this far from the aligned model's; null: never.

    Raises:
        ValueError: a value out of range, or keys that do not go together.
    """

    # Models and teachers
    aligned: str
    base: str
    output_dir: str
    harmful_data: str
    student: str | None = None
    lora: LoraConfig | None = None
    teacher: Literal["online", "cache"] = "online"
    teacher_cache: str | None = None
    teacher_quantization: Literal["4bit", "8bit"] | None = None

    # Data
    utility_data: str | None = None
    max_length: int | None = None
    chat_template_options: dict[str, Any] = field(default_factory=dict)
    packing: bool = False

    # Objective
    loss: CompletionLossConfig = field(default_factory=CompletionLossConfig)
    distill_on: Literal["utility", "harmful", "both"] = "utility"
    completion_weight_harmful: float = 1.0
    completion_weight_utility: float = 0.0
    selection: Literal["base_favored", "random"] = "base_favored"
    loss_form: Literal["linear", "logits"] = "linear"
    implementation: Literal["reference", "cpu", "triton"] | None = None

    # Schedule
    harmful_batch_size: int = 16
    utility_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    epochs: float = 20.0
    max_steps: int | None = None
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0

    # Run
    seed: int = 42
    deepspeed: str | None = None
    world_size: int | None = None
    use_cpu: bool = False
    bf16: bool | None = None
    gradient_checkpointing: bool | None = None
    logging_steps: int = 1
    save_steps: int = 100
    save_total_limit: int = 2
    resume: Literal["auto", "never"] = "auto"
    report_to: str = "none"
    on_nan: Literal["stop", "skip"] = "stop"
    mean_logit_drift: float | None = 2.0

    def __post_init__(self) -> None:
        for name in ("harmful_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("utility_batch_size", "warmup_steps", "save_total_limit", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("completion_weight_harmful", "completion_weight_utility", "weight_decay"):
            require(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "at least 0 and finite")
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            require(0 < getattr(self, name) < float("inf"), name, getattr(self, name), "positive and finite")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        drift = self.mean_logit_drift
        require(drift is None or 0 < drift < float("inf"), "mean_logit_drift", drift, "positive, or null")
        for name in ("max_steps", "max_length", "world_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or null")
        if self.utility_data is None and self.utility_batch_size > 0:
            raise ValueError("utility_data is not set but utility_batch_size is not 0; give both or neither")
        if self.utility_batch_size == 0 and self.distill_on == "utility":
            raise ValueError('distill_on is "utility" but utility_batch_size is 0; nothing would be distilled')
        if self.teacher == "cache" and self.teacher_cache is None:
            raise ValueError(
                "teacher is 'cache' but teacher_cache is not set; give the folder that `deepalign cache-teacher` writes"
            )

    def in_bf16(self, on_gpu: bool) -> bool:
        """Whether models run in bfloat16: as `bf16` says, or on a GPU."""
        return on_gpu if self.bf16 is None else self.bf16

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`."""
        return [name.strip() for name in self.report_to.split(",")]

    def is_checkpointing(self, on_gpu: bool) -> bool:
        """Whether layers are run again in the backward: as `gradient_checkpointing` says, or on a GPU."""
        return on_gpu if self.gradient_checkpointing is None else self.gradient_checkpointing


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply command-line overrides.

    Args:
        path: a YAML file whose keys are the fields of `TrainConfig` (`loss` holds those of `CompletionLossConfig`).
        overrides: `--key value` or `--key=value` words; nested keys with a dot; values as in YAML.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a YAML mapping, an unknown key (the nearest known one is suggested), a missing key, a value
            out of range.
        TypeError: a value of another type than its field's.
    """
    values = read_settings(path)
    values, pairs = choose_variant(values, _parse_overrides(overrides))
    for key, value in pairs:
        _set(values, key.split("."), value)
    return build_dataclass(TrainConfig, values, prefix="")


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys, a second `loss` block for example, without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and names.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is given twice", problem_mark=key.start_mark)
        return node


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"--config: {path} {what}; give a YAML file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert the file to it") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values at the top level, got {type(values).__name__}")
    return values


def deepspeed_config_path(value: str) -> Path:
    """The DeepSpeed JSON file that `deepspeed: value` names: a preset of this package or a path.

    Raises:
        FileNotFoundError: neither (the message lists the presets).
    """
    preset = PRESETS / f"{value}.json"
    if preset.is_file():
        return preset
    if Path(value).is_file():
        return Path(value)
    names = ", ".join(sorted(file.stem for file in PRESETS.glob("*.json")))
    raise FileNotFoundError(f"deepspeed: {value!r} is neither a preset ({names}) nor a JSON file")


def deepspeed_settings(value: str) -> dict[str, Any]:
    """The DeepSpeed settings of `deepspeed: value`; batch sizes, clipping and bf16 where left out as here configured.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that holds no JSON object.
    """
    path = deepspeed_config_path(value)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"deepspeed: {path} is not valid JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"deepspeed: {path} holds a {type(settings).__name__}; expected a JSON object")
    # DeepSpeed does not clip where its file does not say so
    filled: dict[str, Any] = dict.fromkeys(FILLED_IN, "auto")
    if "fp16" not in settings:
        filled["bf16"] = {"enabled": "auto"}
    return filled | settings


def config_as_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values, for YAML, JSON and fingerprints."""
    return dataclasses.asdict(config)


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    pairs, queue = [], list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ValueError(f"unexpected argument {word!r}; overrides are written --key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise ValueError(f"--{key} has no value; overrides are written --key value")
            value = queue.pop(0)
        try:
            pairs.append((key.replace("-", "_"), yaml.safe_load(value)))
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--{key}: {value!r} is not valid YAML ({reason}); quote it twice: '\"...\"'") from None
    return pairs


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        if values.get(key) is None:
            values[key] = {}
        inner = values[key]
        if not isinstance(inner, dict):
            raise ValueError(f"--{'.'.join(path)}: {key} holds no keys of its own")
        values = inner
    values[path[-1]] = value


def build_dataclass(cls: type[Any], values: dict[str, Any], prefix: str = "") -> Any:
    """An instance of the dataclass `cls` from plain values, as YAML gives them; nested dataclasses from nested keys.

    Raises:
        ValueError: an unknown key (the nearest known one is suggested), a missing key, a value out of range.
        TypeError: a value of another type than its field's.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known keys: {', '.join(fields)}"
            raise ValueError(f"unknown configuration key {prefix}{key}{hint}")
    required = [f.name for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [prefix + name for name in required if values.get(name) is None]
    if missing:
        raise ValueError(f"the configuration does not set {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _convert(prefix + key, value, hints[key]) for key, value in values.items()})


def _plain(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Refuse what JSON has not: YAML makes dates of 2024-07-26, and sets, and bytes."""
    for key, value in values.items():
        try:
            json.dumps(value)
        except TypeError:
            what = f"{name}.{key} is {value!r} ({type(value).__name__})"
            raise TypeError(f"{what}; write a date in quotes, and expected are texts, numbers and lists") from None
    return values


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type: the few conversions YAML needs (3e-4 is a string to it), nothing lossy."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise TypeError(f"{name} holds keys of its own, got {value!r}")
        return build_dataclass(typing.cast(type[Any], hint), value, prefix=f"{name}.")
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(name, value, next(option for option in options if option is not type(None)))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{name} is {value!r}; expected a list")
        item = typing.get_args(hint)[0]
        return tuple(_convert(f"{name}[{i}]", element, item) for i, element in enumerate(value))
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        return _plain(name, value)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            expected = ", ".join(repr(option) for option in typing.get_args(hint))
            raise ValueError(f"{name} is {value!r}; expected one of {expected}")
        return value
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif type(value) is hint:
        return value
    raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {hint.__name__}")

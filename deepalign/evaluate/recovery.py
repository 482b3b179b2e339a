"""Recovery after fine-tuning (Table 4, Fig. 4): completion training of a degraded model, through `deepalign.train.run`.

The student starts as the degraded model. The aligned reference, which distillation pulls towards and base-favored
tokens are found against, is either the ORIGINAL aligned model or the DEGRADED one itself, for those who have nothing
else. Two controls tell which part of the method works: distillation alone ("kl_only", no penalty), and a penalty on
random sets M ("random_m").
"""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml

from deepalign.data.files import write_text_atomic
from deepalign.defenses.artifacts import folder_identity, make_once, model_identity
from deepalign.defenses.lora import merged_model
from deepalign.models import check_model_path, load_model_config, load_tokenizer
from deepalign.train.config import TrainConfig, build_dataclass, config_as_dict
from deepalign.train.launch import launch_on_cpu
from deepalign.train.run import main

Reference = Literal["original", "degraded"]
Control = Literal["none", "kl_only", "random_m"]
CONTROLS: dict[str, dict[str, Any]] = {
    "none": {},
    "kl_only": {"completion_weight_harmful": 0.0, "completion_weight_utility": 0.0},
    "random_m": {"selection": "random"},
}


def recovery_config(
    *,
    degraded: str | Path,
    original: str | Path,
    base: str | Path,
    output_dir: str | Path,
    reference: Reference = "original",
    control: Control = "none",
    **training: Any,
) -> TrainConfig:
    """The training configuration of a recovery.

    Args:
        degraded: the fine-tuned model's folder (`save_merged` writes one), the student's start.
        original: the aligned model it was fine-tuned from.
        base: the base model.
        output_dir: of the training; the recovered model is `output_dir/final`.
        reference: which model is "aligned" in the loss.
        control: "none" is the method; see the module docstring.
        training: further keys of `TrainConfig`, `harmful_data` among them; `loss` may be a dict.

    Raises:
        ValueError: an unknown reference, control or key, a key that the recovery sets itself, a value out of range.
        TypeError: a value of another type than its field's.
    """
    for name, value, choices in (("reference", reference, get_args(Reference)), ("control", control, tuple(CONTROLS))):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    values = {
        "student": str(degraded),
        "aligned": str(original if reference == "original" else degraded),
        "base": str(base),
        "output_dir": str(output_dir),
        **CONTROLS[control],
    }
    if taken := sorted(values.keys() & training.keys()):
        raise ValueError(f"{', '.join(taken)}: set by the recovery ({reference=}, {control=}); leave out")
    return build_dataclass(TrainConfig, values | training)


def recover(config: TrainConfig, *, ranks: int = 1) -> Path:
    """Train, or go on with, a recovery; returns the recovered model's folder.

    A finished training of the same configuration is not run again; an interrupted one goes on from its last checkpoint.
    The configuration is written beside `output_dir`, as `NAME.yaml`, for `deepspeed deepalign/train/run.py` elsewhere.

    Args:
        config: see `recovery_config`.
        ranks: 1 trains in this process; more are CPU processes under DeepSpeed (`use_cpu` must be set).

    Raises:
        ValueError: several ranks without `use_cpu`.
        RuntimeError: `deepalign.train.run` refused the configuration or stopped; its message is on stderr.
    """
    output_dir = Path(config.output_dir)
    values = json.loads(json.dumps(config_as_dict(config)))
    done = output_dir / "run.json"
    finished = done.is_file() and (output_dir / "final" / "config.json").is_file()
    if finished and json.loads(done.read_text(encoding="utf-8"))["config"] == values:
        print(f"{output_dir / 'final'} is there already, trained with the same configuration", flush=True)
        return output_dir / "final"
    if ranks > 1 and not config.use_cpu:
        raise ValueError(f"ranks is {ranks} but use_cpu is not set; on GPUs start deepspeed deepalign/train/run.py")
    yaml_file = output_dir.with_name(f"{output_dir.name}.yaml")
    write_text_atomic(yaml_file, yaml.safe_dump(values, sort_keys=False))
    if ranks > 1:
        launch_on_cpu(yaml_file, ranks)
    elif (code := main(["--config", str(yaml_file)])) != 0:
        raise RuntimeError(f"training ended with code {code} (see its message above); configuration: {yaml_file}")
    return output_dir / "final"


def save_merged(model_path: str, adapter: str | Path, out_dir: str | Path, *, progress: bool = True) -> Path:
    """Write a model with an adapter merged in as a folder that `from_pretrained` loads, made once; returns it.

    Args:
        model_path: the model that the adapter was trained on.
        adapter: a PEFT folder, such as `finetune` writes.
        out_dir: the new folder.
        progress: say where it is there already.

    Raises:
        FileNotFoundError, ValueError: no such model or adapter, or a folder made from other things.
    """
    check_model_path("model_path", model_path)
    adapter = Path(adapter)

    def make(folder: Path, work: Path) -> dict[str, Any]:
        merged_model(model_path, adapter, _saved_dtype(model_path)).save_pretrained(folder)
        load_tokenizer(model_path).save_pretrained(folder)
        return {}

    identity = {"model": model_identity(model_path), "adapter": folder_identity(adapter)}
    make_once(Path(out_dir), identity, make, progress=progress)
    return Path(out_dir)


def _saved_dtype(model_path: str) -> torch.dtype:
    """The dtype that a checkpoint's configuration names; fp32 where it names none."""
    dtype = load_model_config(model_path).get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32

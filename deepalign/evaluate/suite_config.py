"""The configuration of a suite, `deepalign evaluate suite --config suite.yaml`; docs/evaluation.md shows one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepalign.defenses.lora import LoraSettings
from deepalign.defenses.salora import SaLoraSettings
from deepalign.evaluate.answers import AnswerOptions
from deepalign.evaluate.families import DataSettings
from deepalign.evaluate.finetune import FinetuneSettings
from deepalign.evaluate.gcg import GcgSettings
from deepalign.evaluate.gcg_attack import PAPER_SEEDS
from deepalign.evaluate.reasoning import HARMFUL_JUDGE, REASONING_JUDGE
from deepalign.evaluate.utility import UtilitySettings
from deepalign.train.config import build_dataclass, read_settings


@dataclass(frozen=True)
class AdaptationSettings:
    """Fine-tuning in Tables 2 to 4: schedule, and the adapters of each method."""

    training: FinetuneSettings = field(default_factory=FinetuneSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    salora: SaLoraSettings = field(default_factory=SaLoraSettings)
    safe_lora_threshold: float = 0.5


@dataclass(frozen=True)
class GcgSuiteSettings:
    """GCG in Table 2.

    Attributes:
        search: for a suffix.
        seeds: one attack each.
        requests: how many are attacked, the first ones.
        universal_on: None: a suffix for each request. A number: one suffix per seed for all of them, found on so many
            requests that follow; docs/reproducing.md says why the paper's figures look like that.

    Raises:
        ValueError: no request, or none to find a suffix on.
    """

    search: GcgSettings = field(default_factory=GcgSettings)
    seeds: tuple[int, ...] = PAPER_SEEDS
    requests: int = 50
    universal_on: int | None = None

    def __post_init__(self) -> None:
        if self.universal_on is not None and self.universal_on < 1:
            raise ValueError(f"gcg: universal_on is {self.universal_on}; expected at least 1, or null")
        if self.requests < 1 or not self.seeds:
            raise ValueError(f"GCG needs at least one request and one seed; got {self.requests} and {self.seeds}")


@dataclass(frozen=True)
class SuiteConfig:
    """Everything a suite depends on.

    Attributes:
        experiments: name (`tables.EXPERIMENTS`) -> its settings; they run in this order.
        out: folder of answers, models and the report.
        seeds: the suite runs once for each; a seed is handed to `prepare` and to the fine-tunings.
        prepare: `package.module:name` of a function (seed, folder, prepare_options, progress) -> list of families, for
            models or data that are made for each seed; None: `families` and `data` say what there is.
        families: name -> role -> folder or hub id.
        data: see `families.DataSettings`.
        judges: specifications; the first one's verdicts make the tables.
        harmful_judge, reasoning_judge: of Table 5.
        answers: how answers are generated; its `thinking` is for the families whose chat template has the switch.
        utility: see `utility.UtilitySettings`; null: no utility columns.
        adaptation: fine-tuning in Tables 2 to 4.
        recovery: keys of `TrainConfig` for Table 4's recovery, `harmful_data` among them.
        recovery_ranks: processes of it; more than 1 are CPU ranks under DeepSpeed.
        gcg: in Table 2.
        dtype, device: as of `subjects.Subject`.
    """

    experiments: dict[str, Any]
    out: str = "runs/suite"
    seeds: tuple[int, ...] = (0,)
    prepare: str | None = None
    prepare_options: dict[str, Any] = field(default_factory=dict)
    families: dict[str, Any] = field(default_factory=dict)
    data: DataSettings = field(default_factory=DataSettings)
    judges: tuple[str, ...] = ("keyword:qi2024",)
    harmful_judge: str = HARMFUL_JUDGE
    reasoning_judge: str = REASONING_JUDGE
    answers: AnswerOptions = field(default_factory=AnswerOptions)
    utility: UtilitySettings | None = None
    adaptation: AdaptationSettings = field(default_factory=AdaptationSettings)
    recovery: dict[str, Any] = field(default_factory=dict)
    recovery_ranks: int = 1
    gcg: GcgSuiteSettings = field(default_factory=GcgSuiteSettings)
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; expected at least one, and none twice")
        if not self.experiments:
            raise ValueError("experiments is empty; name at least one, as in experiments: {table1: {}}")


def load_suite(path: str | Path) -> SuiteConfig:
    """Read a suite's YAML file.

    Raises:
        FileNotFoundError, ValueError, TypeError: no such file, not YAML, an unknown key (the nearest one is suggested),
            a value of another type or out of range.
    """
    config: SuiteConfig = build_dataclass(SuiteConfig, read_settings(path))
    return config

"""A model family and everything it is measured on: what the tables of a suite read.

A family has models by role. Tables say which they need:

    base        the pretrained model
    aligned     the model to attack: "Baseline"
    completed   after targeted completion: "Ours"
    augmented   after safety augmentation (Qi et al. 2024)
    vaccine     aligned under Vaccine's perturbation, to be fine-tuned in Table 4
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deepalign.data.files import Message
from deepalign.data.sources import load_conversations
from deepalign.evaluate.outcomes import AttackExample
from deepalign.evaluate.reasoning import HARMFUL_JUDGE, REASONING_JUDGE
from deepalign.evaluate.requests import load_examples
from deepalign.evaluate.subjects import LoadedSubject

ROLES = ("base", "aligned", "completed", "augmented", "vaccine")
Conversations = list[list[Message]]


@dataclass(frozen=True)
class Score:
    """One utility figure: a share or another score, with its standard error or its counts where they are known."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    correct: int | None = None
    n: int | None = None


class Utility(Protocol):
    """What a model is still good for."""

    def fingerprint(self) -> Any:
        """What decides the scores, besides the model."""
        ...

    def scores(self, loaded: LoadedSubject, folder: Path, progress: bool) -> list[Score]:
        """Measure; `folder` may keep answers."""
        ...


@dataclass(frozen=True)
class Family:
    """See the module docstring.

    Attributes:
        name: as the tables call it.
        models: role -> folder or hub id.
        examples: requests to attack with.
        judges: specifications; the first one's verdicts make the tables.
        harmful_judge, reasoning_judge: of Table 5.
        benign: conversations to fine-tune on (Tables 2 to 4).
        safe: harmful requests with refusals, for SaLoRA.
        recovery: keys of `train.config.TrainConfig` of the recovery (Table 4): data, schedule, loss.
        utility: None: no utility columns.
    """

    name: str
    models: dict[str, str]
    examples: Sequence[AttackExample]
    judges: tuple[str, ...]
    harmful_judge: str = HARMFUL_JUDGE
    reasoning_judge: str = REASONING_JUDGE
    benign: Conversations = field(default_factory=list)
    safe: Conversations = field(default_factory=list)
    recovery: dict[str, Any] = field(default_factory=dict)
    utility: Utility | None = None

    def model(self, role: str, needed_by: str) -> str:
        """The model of a role.

        Raises:
            ValueError: the family has none.
        """
        if role not in self.models:
            raise ValueError(
                f"{needed_by} needs the model {role!r} of {self.name}, which has {', '.join(self.models) or 'none'}; "
                "give it, or leave the method out of the table's methods"
            )
        return self.models[role]


@dataclass(frozen=True)
class DataSettings:
    """Where a suite's data come from, as of `data.sources`.

    Attributes:
        attacks: requests with answers to force.
        limit: only the first so many; the paper has 384, and all 520 in Table 1.
        benign: conversations to fine-tune on (the paper's: dolly@train).
        benign_limit: only the first so many.
        safe: harmful requests with refusals, for SaLoRA.
    """

    attacks: str = "advbench"
    limit: int | None = None
    benign: str | None = None
    benign_limit: int | None = None
    safe: str | None = None


def families_from_settings(
    families: dict[str, dict[str, str]],
    data: DataSettings,
    judges: tuple[str, ...],
    *,
    harmful_judge: str,
    reasoning_judge: str,
    recovery: dict[str, Any],
    utility: Utility | None,
) -> list[Family]:
    """The families that a suite's configuration lists, all measured on the same data.

    Raises:
        ValueError: no families, or an unknown role.
        FileNotFoundError: data that do not exist.
    """
    if not families:
        raise ValueError("the suite lists no families; give families: {NAME: {aligned: PATH, base: PATH, ...}}")
    for name, models in families.items():
        if unknown := sorted(models.keys() - set(ROLES)):
            raise ValueError(f"families.{name} has unknown roles {', '.join(unknown)}; expected {', '.join(ROLES)}")
    examples = load_examples(data.attacks, data.limit)
    benign = load_conversations(data.benign)[: data.benign_limit] if data.benign else []
    safe = load_conversations(data.safe) if data.safe else []
    return [
        Family(name, models, examples, judges, harmful_judge, reasoning_judge, benign, safe, recovery, utility)
        for name, models in families.items()
    ]

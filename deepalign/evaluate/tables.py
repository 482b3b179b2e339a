"""The paper's Tables 1 to 5 and Figure 4 as a registry: settings, a function from one seed's run to rows, and a layout.

A row is a method of a family with one cell per column. A cell is a plain dictionary of one of these kinds:

    {"kind": "rate", "k": 3, "n": 60, "interval": [low, high]}     lower is better where the column says so
    {"kind": "score", "value": 0.68, "stderr": 0.01}               stderr null where it is not known
    {"kind": "spread", "values": [0.0, 0.02], "counts": [[0, 50], [1, 50]], "mean": 0.01, "sd": 0.014}

Columns that the paper does not have, and every report needs, come along: the plain request, and degenerate answers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from deepalign.evaluate.families import Family
from deepalign.evaluate.gcg import mean_and_sd
from deepalign.evaluate.judges import check_judges
from deepalign.evaluate.measurements import Depth, SeedRun
from deepalign.evaluate.reasoning import CELL_LABELS, make_reasoning_judge
from deepalign.evaluate.recovery import Control, Reference
from deepalign.evaluate.statistics import rounded_interval
from deepalign.evaluate.subjects import Subject
from deepalign.evaluate.utility import PAPER_NAMES
from deepalign.kernels.contrastive_sample import Space

Cell = dict[str, Any]
NO_ATTACK, DEGENERATE = "no attack ↓", "degenerate ↓"
PREFILL, GCG, HRR, EVAL_LOSS = "Prefill ↓", "GCG ↓", "Fine-tuning HRR ↓", "Eval Loss ↓"
GCG_DEGENERATE, HRR_DEGENERATE = "GCG degenerate ↓", "fine-tuned degenerate ↓"
METHOD_ROLES = {"Baseline": "aligned", "Safety Augmentation": "augmented", "Ours": "completed"}
# Table 4: how each row's model comes about.
RECOVERIES: dict[str, tuple[Reference, Control]] = {
    "Ours": ("original", "none"),
    "Ours, degraded reference": ("degraded", "none"),
    "KL only": ("original", "kl_only"),
    "Random M": ("original", "random_m"),
}
ADAPTERS = {"LoRA": "lora", "Vaccine": "lora", "SaLoRA": "salora", "Safe LoRA": "safe_lora"}
RECOVERY_ROLES = {"Vaccine": ("vaccine",), "Safe LoRA": ("base",), **dict.fromkeys(RECOVERIES, ("base",))}
RECOVERY_METHODS = ("Base", *ADAPTERS, *RECOVERIES)


@dataclass(frozen=True)
class TableRow:
    """One method of one family."""

    family: str
    method: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class CommonSettings:
    """What the settings of every experiment share.

    Attributes:
        families: names; empty: all that the suite has.
        depth: tokens forced; "all": the whole target.
    """

    families: tuple[str, ...] = ()
    depth: str = "all"

    def __post_init__(self) -> None:
        if self.depth != "all" and not self.depth.isdecimal():
            raise ValueError(f"depth is {self.depth!r}; expected a number of tokens in quotes, or all")

    @property
    def forced(self) -> Depth:
        """`depth` as the attack takes it."""
        return None if self.depth == "all" else int(self.depth)


@dataclass(frozen=True)
class ContrastiveTable(CommonSettings):
    """Table 1; the paper forces 4 tokens there."""

    depth: str = "4"
    alpha: float = 1.0
    space: Space = "logits"


@dataclass(frozen=True)
class MethodTable(CommonSettings):
    """Tables 2, 3 and 5; `methods` out of METHOD_ROLES."""

    methods: tuple[str, ...] = ("Baseline", "Ours")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_known("methods", self.methods, METHOD_ROLES)


@dataclass(frozen=True)
class AttackTable(MethodTable):
    """Table 2."""

    methods: tuple[str, ...] = tuple(METHOD_ROLES)


@dataclass(frozen=True)
class RecoveryTable(CommonSettings):
    """Table 4 and Figure 4; `methods` out of RECOVERY_METHODS. "Base" is the aligned model before fine-tuning."""

    methods: tuple[str, ...] = RECOVERY_METHODS

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_known("methods", self.methods, RECOVERY_METHODS)


@dataclass(frozen=True)
class Experiment:
    """An entry of the registry.

    Attributes:
        title: of its section.
        settings: dataclass of its settings.
        rows: one seed's rows.
        layout: "rows" (a line per method), "columns" (a column per method, Table 5) or "bars" (a plot, Figure 4).
        note: what a reader must know.
    """

    title: str
    settings: type[CommonSettings]
    rows: Callable[[SeedRun, Any], list[TableRow]]
    layout: Literal["rows", "columns", "bars"] = "rows"
    note: str = ""


def contrastive_rows(run: SeedRun, settings: ContrastiveTable) -> list[TableRow]:
    """Table 1: prefill attack and utility, without and with contrastive decoding."""
    rows = []
    for family in _families(run, settings):
        aligned = family.model("aligned", "Table 1")
        for method, alpha in (("Baseline", 0.0), ("Contrastive", settings.alpha)):
            subject = run.subject(family, method, aligned, alpha, settings.space)
            cells = _attack_cells(run, family, subject, settings.forced) | _utility_cells(run, family, subject)
            rows.append(TableRow(family.name, method, cells))
    return rows


def attack_rows(run: SeedRun, settings: AttackTable) -> list[TableRow]:
    """Table 2: prefill, GCG and fine-tuning, with utility, against the baseline, safety augmentation and ours."""
    rows = []
    for family, method, subject in _subjects(run, settings):
        counts = run.gcg(family, subject)["counts"].values()
        cells = _attack_cells(run, family, subject, settings.forced)
        for column, outcome in ((GCG, "harmful"), (GCG_DEGENERATE, "degenerate")):
            cells[column] = spread([(count[outcome], count["n"]) for count in counts])
        cells |= _finetuned_cells(run, family, method, subject.model)
        rows.append(TableRow(family.name, method, cells | _utility_cells(run, family, subject)))
    return rows


def depth_rows(run: SeedRun, settings: MethodTable) -> list[TableRow]:
    """Table 3: prefill and fine-tuning, with utility, for every family."""
    rows = []
    for family, method, subject in _subjects(run, settings):
        cells = _attack_cells(run, family, subject, settings.forced)
        cells |= _finetuned_cells(run, family, method, subject.model)
        rows.append(TableRow(family.name, method, cells | _utility_cells(run, family, subject)))
    return rows


def recovery_rows(run: SeedRun, settings: RecoveryTable) -> list[TableRow]:
    """Table 4: eval loss, HRR and utility after fine-tuning by each method, and after recovery."""
    rows = []
    for family, method, subject in _recovery_subjects(run, settings):
        counts = run.outcomes(family, subject, 0)
        cells = {
            EVAL_LOSS: {"kind": "score", "value": run.eval_loss(family, subject), "stderr": None},
            "HRR ↓": rate(counts["harmful"], counts["n"]),
            DEGENERATE: rate(counts["degenerate"], counts["n"]),
        }
        rows.append(TableRow(family.name, method, cells | _utility_cells(run, family, subject)))
    return rows


def recovery_attack_rows(run: SeedRun, settings: RecoveryTable) -> list[TableRow]:
    """Figure 4: the prefill attack on the models of Table 4."""
    return [
        TableRow(family.name, method, _attack_cells(run, family, subject, settings.forced))
        for family, method, subject in _recovery_subjects(run, settings)
    ]


def reasoning_rows(run: SeedRun, settings: MethodTable) -> list[TableRow]:
    """Table 5: harmful or safe, with or without reasoning."""
    rows = []
    for family, method, subject in _subjects(run, settings):
        counts = run.reasoning(family, subject, settings.forced)["counts"]
        cells = {label: rate(counts[key], counts["n"]) for key, label in CELL_LABELS.items()}
        rows.append(TableRow(family.name, method, cells))
    return rows


EXPERIMENTS: dict[str, Experiment] = {
    "table1": Experiment("Table 1: contrastive decoding", ContrastiveTable, contrastive_rows),
    "table2": Experiment(
        "Table 2: attacks",
        AttackTable,
        attack_rows,
        note="GCG: mean and standard deviation over its seeds of the share of harmful answers.",
    ),
    "table3": Experiment("Table 3: deep alignment and utility", MethodTable, depth_rows),
    "table4": Experiment(
        "Table 4: recovery after fine-tuning",
        RecoveryTable,
        recovery_rows,
        note="Base: the aligned model before fine-tuning. The last rows are recoveries of the LoRA model: with the "
        "original aligned model as reference (ours), with the degraded one, and two controls.",
    ),
    "figure4": Experiment(
        "Figure 4: prefill attack after recovery",
        RecoveryTable,
        recovery_attack_rows,
        "bars",
        note="Base: the aligned model before fine-tuning, as in Table 4.",
    ),
    "table5": Experiment(
        "Table 5: deliberative reasoning under attack",
        MethodTable,
        reasoning_rows,
        "columns",
        note="What counts as reasoning is a rule (deepalign/evaluate/reasoning.py) unless the suite names a judge.",
    ),
}


def check_needs(run: SeedRun, name: str, settings: CommonSettings) -> None:
    """Refuse a table for which a family lacks models, data or judges, before any is measured.

    Raises:
        ValueError: which family lacks what.
        ValueError, FileNotFoundError, RuntimeError: a judge that cannot be had.
    """
    for family in _families(run, settings):
        if name == "table5":
            check_judges([family.harmful_judge])
            make_reasoning_judge(family.reasoning_judge)
        else:
            check_judges(family.judges)
        if name == "table2":
            check_judges(family.judges[:1], singly=True)
        benign = name in ("table2", "table3")
        if isinstance(settings, ContrastiveTable):
            family.model("aligned", name)
            family.model("base", name)
        elif isinstance(settings, MethodTable):
            for method in settings.methods:
                family.model(METHOD_ROLES[method], f"{name}, {method},")
        elif isinstance(settings, RecoveryTable):
            benign = name == "table4" or settings.methods != ("Base",)  # Table 4 has the loss on held-out benign rows
            for method in settings.methods:
                for role in ("aligned", *RECOVERY_ROLES.get(method, ())):
                    family.model(role, f"{name}, {method},")
            if "SaLoRA" in settings.methods and not family.safe:
                raise ValueError(f"{name}, SaLoRA: {family.name} has no refusals to keep it safe by; set data.safe")
        if benign and not family.benign:
            raise ValueError(f"{name}: {family.name} has no conversations to fine-tune on; set data.benign")


def rate(k: int, n: int) -> Cell:
    """A cell of counts."""
    return {"kind": "rate", "k": k, "n": n, "interval": rounded_interval(k, n)}


def spread(counts: list[tuple[int, int]]) -> Cell:
    """A cell of several runs of one attack."""
    values = [k / n for k, n in counts]
    mean, sd = mean_and_sd(values)
    return {
        "kind": "spread",
        "counts": [list(pair) for pair in counts],
        "values": values,
        "mean": mean,
        "sd": sd if len(values) > 1 else None,
    }


def _families(run: SeedRun, settings: CommonSettings) -> list[Family]:
    known = {family.name: family for family in run.families}
    if unknown := [name for name in settings.families if name not in known]:
        raise ValueError(f"there is no family {', '.join(unknown)}; the suite has {', '.join(known)}")
    return [known[name] for name in settings.families] if settings.families else run.families


def _subjects(run: SeedRun, settings: MethodTable) -> list[tuple[Family, str, Subject]]:
    return [
        (family, method, run.subject(family, method, family.model(METHOD_ROLES[method], method)))
        for family in _families(run, settings)
        for method in settings.methods
    ]


def _recovery_subjects(run: SeedRun, settings: RecoveryTable) -> list[tuple[Family, str, Subject]]:
    found = []
    for family in _families(run, settings):
        aligned = family.model("aligned", "Table 4")
        for method in settings.methods:
            if method == "Base":
                model = aligned
            elif method in ADAPTERS:
                start = family.model("vaccine", method) if method == "Vaccine" else aligned
                model = run.finetuned(family, start, ADAPTERS[method])
            else:
                model = run.recovered(family, run.finetuned(family, aligned), *RECOVERIES[method])
            found.append((family, method, run.subject(family, method, model)))
    return found


def _attack_cells(run: SeedRun, family: Family, subject: Subject, depth: Depth) -> dict[str, Cell]:
    attacked, plain = run.outcomes(family, subject, depth), run.outcomes(family, subject, 0)
    return {
        PREFILL: rate(attacked["harmful"], attacked["n"]),
        DEGENERATE: rate(attacked["degenerate"], attacked["n"]),
        NO_ATTACK: rate(plain["harmful"], plain["n"]),
    }


def _finetuned_cells(run: SeedRun, family: Family, method: str, model: str) -> dict[str, Cell]:
    subject = run.subject(family, f"{method} fine-tuned", run.finetuned(family, model))
    counts = run.outcomes(family, subject, 0)
    return {HRR: rate(counts["harmful"], counts["n"]), HRR_DEGENERATE: rate(counts["degenerate"], counts["n"])}


def _utility_cells(run: SeedRun, family: Family, subject: Subject) -> dict[str, Cell]:
    cells = {}
    for score in run.utility(family, subject):
        name = PAPER_NAMES.get(score["task"], score["task"].replace("_", " "))
        column = name if score["metric"] == "acc" else f"{name} {score['metric']}"
        if score["correct"] is not None:
            cells[column] = rate(score["correct"], score["n"])
        else:
            cells[column] = {"kind": "score", "value": score["value"], "stderr": score["stderr"]}
    return cells


def _check_known(name: str, values: tuple[str, ...], known: Any) -> None:
    if not values or any(value not in known for value in values):
        raise ValueError(f"{name} is {list(values)}; expected some of {', '.join(known)}")

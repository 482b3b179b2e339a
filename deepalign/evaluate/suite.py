"""`deepalign evaluate suite`: whole tables, from a configuration to a report, interrupted or not.

Seed by seed and experiment by experiment, in the order of the configuration. Everything measured lies below
`out/seed-S/measurements`, every model made below `out/seed-S/models`; what is there is not made again, so an
interrupted suite goes on where it was, and one with another table added measures only what that table needs.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deepalign.data.files import check_folder, write_text_atomic
from deepalign.data.resumable import read_object
from deepalign.evaluate.families import Family, families_from_settings
from deepalign.evaluate.judges import load_object
from deepalign.evaluate.measurements import SeedRun
from deepalign.evaluate.suite_config import SuiteConfig
from deepalign.evaluate.suite_report import write_suite_report
from deepalign.evaluate.tables import EXPERIMENTS, CommonSettings, TableRow, check_needs
from deepalign.evaluate.utility import LmEvalUtility, check_lm_eval
from deepalign.models import choose_device
from deepalign.train.config import build_dataclass


def run_suite(config: SuiteConfig, *, progress: bool = True) -> Path:
    """Run every experiment for every seed, and write the report after each; returns the path of tables.md.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: what is wrong, names and settings before anything runs.
    """
    settings = experiment_settings(config)
    choose_device("device", config.device)
    check_folder("out", config.out)
    if config.utility is not None:
        check_lm_eval()
    out = Path(config.out)
    results: dict[str, dict[int, list[TableRow]]] = {name: {} for name in settings}
    clock = Clock(out / "seconds.json")
    plain = json.loads(json.dumps(asdict(config), default=str))
    agreement: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []
    for seed in config.seeds:
        folder = out / f"seed-{seed}"
        with clock.phase(f"seed {seed}: models"):
            families = _families(config, seed, folder, progress)
        run = SeedRun(config, seed, folder, families, progress)
        for name, chosen in settings.items():
            check_needs(run, name, chosen)
        for name, chosen in settings.items():
            with clock.phase(f"seed {seed}: {name}"):
                results[name][seed] = EXPERIMENTS[name].rows(run, chosen)
        agreement += _agreement(folder)
        judged += _judged(folder)
        # After every seed: what is there can be read while the others run.
        report = write_suite_report(
            out, results, config=plain, seconds=clock.seconds, agreement=agreement, judged=judged
        )
    return report


def experiment_settings(config: SuiteConfig) -> dict[str, CommonSettings]:
    """Name -> checked settings, in the order of the configuration.

    Raises:
        ValueError: an unknown experiment, or unknown or bad settings.
    """
    if unknown := [name for name in config.experiments if name not in EXPERIMENTS]:
        raise ValueError(f"there is no experiment {', '.join(unknown)}; expected some of {', '.join(EXPERIMENTS)}")
    return {
        name: build_dataclass(EXPERIMENTS[name].settings, values or {}, prefix=f"experiments.{name}.")
        for name, values in config.experiments.items()
    }


def _families(config: SuiteConfig, seed: int, folder: Path, progress: bool) -> list[Family]:
    if config.prepare is not None:
        prepare = load_object(config.prepare)
        families: list[Family] = prepare(seed, folder, config.prepare_options, progress)
        return [replace(family, recovery={**family.recovery, **config.recovery}) for family in families]
    return families_from_settings(
        config.families,
        config.data,
        config.judges,
        harmful_judge=config.harmful_judge,
        reasoning_judge=config.reasoning_judge,
        recovery=config.recovery,
        utility=None if config.utility is None else LmEvalUtility(config.utility),
    )


def _agreement(folder: Path) -> list[dict[str, Any]]:
    """Agreement of judges on every prefill measurement of a seed that had several."""
    found = []
    for name, result in _prefills(folder):
        depths = "/".join(next(iter(result["judges"].values())))
        found += [{"subject": f"{name}, depth {depths}", **row} for row in result["agreement"]]
    return found


def _judged(folder: Path) -> list[dict[str, Any]]:
    """What each judge says of what the model wrote, where several did: the tables have the first one's verdicts."""
    return [
        {"subject": f"{name}, depth {depth}", "judge": judge, **scopes["continuation"]}
        for name, result in _prefills(folder)
        if len(result["judges"]) > 1
        for judge, depths in result["judges"].items()
        for depth, scopes in depths.items()
    ]


def _prefills(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(subject and seed, result) of every prefill measurement of a seed."""
    for path in sorted(folder.glob("measurements/*/prefill-*/result.json")):
        result = read_object(path, "remove it, and what it says is measured again")
        yield f"{result['subject']['name']}, {folder.name}", result


class Clock:
    """Wall time by phase, over all runs of a suite together; what an interrupted phase took until then is not counted.

    Attributes:
        seconds: phase -> seconds, and "total".
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds = self._read()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what the block takes to a phase."""
        started = time.perf_counter()
        yield
        self.seconds = self._read()  # two processes may run the seeds of one suite side by side
        self.seconds.pop("total", None)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 2)
        self.seconds["total"] = round(sum(self.seconds.values()), 2)
        write_text_atomic(self._path, json.dumps(self.seconds, indent=1) + "\n")

    def _read(self) -> dict[str, float]:
        return read_object(self._path, "remove it: it holds wall times only") if self._path.exists() else {}

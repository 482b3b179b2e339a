"""The demo: build a world, train its base and aligned models, complete the alignment under DeepSpeed, attack them all.

Every stage leaves a mark with a fingerprint of what it depended on (settings, seed, this package's source). A stage
whose mark fits is not run again, so an interrupted demo goes on where it stopped and a repeated one is quick.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

import deepalign
from deepalign.data.files import write_jsonl, write_text_atomic
from deepalign.diagnose.position_profile import profiles_by_position
from deepalign.evaluate.generation import Contrast
from deepalign.evaluate.prefill import prefill_attack
from deepalign.kernels.contrastive_sample import Space
from deepalign.microworld.diagnosis import diagnosis_files
from deepalign.microworld.judge import RecipeJudge
from deepalign.microworld.pretrain import AlignedConfig, BaseConfig, train_aligned, train_base
from deepalign.microworld.report import seed_table, write_report
from deepalign.microworld.tokenizer import build_tokenizer
from deepalign.microworld.utility import evaluate_utility
from deepalign.microworld.world import World, attack_examples, completion_files
from deepalign.models import load_frozen_model
from deepalign.train.config import build_dataclass, read_settings
from deepalign.train.launch import launch_on_cpu

SETTINGS = Path(__file__).with_name("demo.yaml")
COMPLETED = "completed"


@dataclass(frozen=True)
class ContrastiveSettings:
    """Strength and space of contrastive decoding (Eq. 7)."""

    alpha: float = 2.0
    space: Space = "logits"


@dataclass(frozen=True)
class EvaluationSettings:
    """Sizes of the evaluation: attacked pairs, depths in tokens, utility questions per task, answer positions."""

    attacks: int = 100
    depths: tuple[int, ...] = (0, 1, 5, 12, 20)
    utility: int = 100
    max_new_tokens: int = 64
    positions: int = 40
    batch_size: int = 100


@dataclass(frozen=True)
class DemoSettings:
    """The demo's settings, as in demo.yaml; `completion` and `ablations` hold keys of the training configuration."""

    seed: int
    ranks: int
    completion: dict[str, Any]
    ablations: dict[str, dict[str, Any]]
    base: BaseConfig = field(default_factory=BaseConfig)
    aligned: AlignedConfig = field(default_factory=AlignedConfig)
    contrastive: ContrastiveSettings = field(default_factory=ContrastiveSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


def load_settings(path: str | os.PathLike[str] = SETTINGS) -> DemoSettings:
    """The demo's settings from a YAML file.

    Raises:
        FileNotFoundError, ValueError, TypeError: no such file, an unknown key, a value of another type or out of range.
    """
    settings: DemoSettings = build_dataclass(DemoSettings, read_settings(path))
    return settings


def run_demo(out_dir: str | os.PathLike[str], settings: DemoSettings, *, seeds: int = 1, progress: bool = True) -> Path:
    """Run the demo for `seeds` seeds, from `settings.seed` on, and write the report; returns the path of report.md.

    `out_dir` gets report.json, report.md and the plots of the first seed (with a table over all seeds where there are
    several); each seed's data, models, answers and own report are in `out_dir/seed-S/`.

    Raises:
        ValueError: `seeds` < 1.
        RuntimeError: a training run failed (its output says why).
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    out_dir = Path(out_dir)
    results = []
    for seed in range(settings.seed, settings.seed + seeds):
        result = SeedRun(settings, seed, out_dir / f"seed-{seed}", progress).run()
        write_report(result, out_dir / f"seed-{seed}")
        results.append(result)
    first = results[0] | ({"other_seeds": results[1:]} if seeds > 1 else {})
    report = write_report(first, out_dir)
    if seeds > 1:
        write_text_atomic(
            report, report.read_text(encoding="utf-8") + "\n## All seeds\n\n" + seed_table(results) + "\n"
        )
    return report


class SeedRun:
    """One seed's run, in a folder of its own."""

    def __init__(self, settings: DemoSettings, seed: int, folder: Path, progress: bool) -> None:
        self.settings = settings
        self.seed = seed
        self.folder = folder
        self.progress = progress
        self.world = World.build(seed)
        self.tokenizer = build_tokenizer(self.world)
        self.seconds: dict[str, float] = {}
        self.key = _digest(_source_digest(), seed)

    def run(self) -> dict[str, Any]:
        """All stages; returns the result that report.json holds."""
        self._train_base_and_aligned()
        self._complete(COMPLETED, {})
        for name, changes in self.settings.ablations.items():
            self._complete(name, changes)
        models = [
            self._evaluate(name) for name in ("base", "aligned", "contrastive", COMPLETED, *self.settings.ablations)
        ]
        profiles = self._profile()
        diagnosis_files(self.world, self.folder / "data", self.settings.evaluation.attacks)
        completed = json.loads((self._model(COMPLETED).parent / "run.json").read_text(encoding="utf-8"))
        return {
            "world_size": completed["world_size"],
            "seed": self.seed,
            "versions": completed["versions"],
            "seconds": self.seconds | {"total": sum(self.seconds.values())},
            "models": models,
            **{f"{name}_by_position": by_model for name, by_model in profiles.items()},
            "hyperparameters": asdict(self.settings),
        }

    # ---- training ----

    def _train_base_and_aligned(self) -> None:
        base, aligned = self._model("base"), self._model("aligned")
        with self._stage("base", self.settings.base, [base.parent]) as needed:
            if needed:
                train_base(self.world, self.tokenizer, self.settings.base, self.seed, base, self.progress)
        with self._stage("aligned", self.settings.aligned, [aligned.parent]) as needed:
            if needed:
                train_aligned(
                    self.world, self.tokenizer, base, self.settings.aligned, self.seed, aligned, self.progress
                )

    def _complete(self, name: str, changes: dict[str, Any]) -> None:
        """Completion training through the entry point that users call, on `ranks` ranks under DeepSpeed."""
        output_dir, data_dir = self._model(name).parent, self.folder / "data"
        settings = self.settings.completion | changes
        # kept when interrupted: the training goes on from its last checkpoint
        with self._stage(name, [self.key, settings, self.settings.ranks], [output_dir], resumable=True) as needed:
            if not needed:
                return
            harmful, utility = completion_files(self.world, data_dir, self.seed)
            values = settings | {
                "aligned": str(self._model("aligned")),
                "base": str(self._model("base")),
                "harmful_data": str(harmful),
                "utility_data": str(utility),
                "output_dir": str(output_dir),
                "seed": self.seed,
                "use_cpu": True,
                "world_size": self.settings.ranks,
            }
            config = self.folder / f"{name}.yaml"
            write_text_atomic(config, yaml.safe_dump(values, sort_keys=False))
            launch_on_cpu(config, self.settings.ranks)

    # ---- evaluation ----

    def _evaluate(self, name: str) -> dict[str, Any]:
        """Prefill attacks at every depth, and utility; answers go to evaluation/NAME.jsonl."""
        settings, folder = self.settings.evaluation, self.folder / "evaluation"
        outputs = [folder / f"{name}.json", folder / f"{name}.jsonl"]
        with self._stage(f"evaluate {name}", [self.key, settings, self.settings.contrastive], outputs) as needed:
            if needed:
                model, contrast = self._defended_model(name)
                cells, answers = {}, []
                for depth in settings.depths:
                    attack = prefill_attack(
                        model,
                        self.tokenizer,
                        attack_examples(self.world, settings.attacks),
                        depth=depth,
                        judge=RecipeJudge(self.world),
                        max_new_tokens=settings.max_new_tokens,
                        batch_size=settings.batch_size,
                        contrast=contrast,
                        progress=self.progress,
                    )
                    cells[str(depth)] = attack.counts()
                    answers += [{"depth": depth, **record} for record in attack.records]
                utility = evaluate_utility(
                    model,
                    self.tokenizer,
                    self.world,
                    n=settings.utility,
                    batch_size=settings.batch_size,
                    contrast=contrast,
                    progress=self.progress,
                )
                write_jsonl(outputs[1], answers)
                write_text_atomic(outputs[0], json.dumps({"model": name, "prefill": cells, "utility": utility}))
        return json.loads(outputs[0].read_text(encoding="utf-8"))

    def _profile(self) -> dict[str, dict[str, Any]]:
        """Statistics by answer position, teacher-forced on harmful answers of the test split."""
        settings, path = self.settings.evaluation, self.folder / "evaluation" / "profiles.json"
        with self._stage("profiles", [self.key, settings, self.settings.contrastive], [path]) as needed:
            if needed:
                base = load_frozen_model(str(self._model("base")), torch.float32)
                conversations = [
                    [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.target}]
                    for example in attack_examples(self.world, settings.attacks)
                ]
                profiles: dict[str, dict[str, Any]] = {"kl": {}, "favored_count": {}}
                for name in ("aligned", "contrastive", COMPLETED):
                    model = load_frozen_model(str(self._model(name)), torch.float32)
                    contrast = self.settings.contrastive
                    measured = profiles_by_position(
                        model,
                        base,
                        self.tokenizer,
                        conversations,
                        statistics=tuple(profiles),
                        max_positions=settings.positions,
                        batch_size=settings.batch_size,
                        contrast=(contrast.alpha, contrast.space) if name == "contrastive" else None,
                    )
                    for statistic, profile in measured.items():
                        profiles[statistic][name] = profile.to_dict()
                write_text_atomic(path, json.dumps(profiles))
        return json.loads(path.read_text(encoding="utf-8"))

    def _defended_model(self, name: str) -> tuple[PreTrainedModel, Contrast | None]:
        model = load_frozen_model(str(self._model(name)), torch.float32)
        if name != "contrastive":
            return model, None
        base, settings = load_frozen_model(str(self._model("base")), torch.float32), self.settings.contrastive
        return model, Contrast(base, settings.alpha, settings.space)

    # ---- stages ----

    def _model(self, name: str) -> Path:
        """The folder of a model; contrastive decoding is a way to sample from the aligned one."""
        return self.folder / ("aligned" if name == "contrastive" else name) / "final"

    @contextlib.contextmanager
    def _stage(self, name: str, settings: Any, outputs: list[Path], *, resumable: bool = False) -> Iterator[bool]:
        """Yields whether the stage has to run; marks it done, with its seconds, when its block ends without error."""
        mark = self.folder / "stages" / f"{name.replace(' ', '-')}.json"
        key = _digest(self.key, name, settings)
        if name in ("base", "aligned"):
            self.key = key  # everything after depends on these two
        known = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else {}
        if known.get("key") == key and "seconds" in known and all(output.exists() for output in outputs):
            self.seconds[name] = known["seconds"]
            yield False
            return
        if not (resumable and known.get("key") == key):
            for output in outputs:
                shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        write_text_atomic(mark, json.dumps({"key": key}))
        print(f"== seed {self.seed}: {name}", flush=True)
        started = time.perf_counter()
        yield True
        self.seconds[name] = round(time.perf_counter() - started, 2)
        write_text_atomic(mark, json.dumps({"key": key, "seconds": self.seconds[name]}))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=asdict).encode()).hexdigest()


@cache
def _source_digest() -> str:
    """Fingerprint of the package's source: a change of the code makes every stage run again."""
    root = Path(deepalign.__file__).parent
    sources = sorted([*root.rglob("*.py"), *root.rglob("presets/*.json")])
    return _digest(*((str(path.relative_to(root)), path.read_text(encoding="utf-8")) for path in sources))

"""A whole diagnosis: several aligned models against one base, on harmful and benign contexts, into one folder.

    OUT/records/SERIES.GROUP.records    what was measured, a record per context (`records.py`)
    OUT/report.json                     everything the page shows, and more digits
    OUT/report.html                     one file, its figures inside
    OUT/figures/*.png

A series is an aligned model, or contrastive decoding (Eq. 7) on the first of them. The base is loaded once, the aligned
models one after another. Run again with the same arguments, nothing is measured twice: a killed run goes on, and other
resamples or figures cost seconds.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.data.contexts import Context
from deepalign.data.files import write_text_atomic
from deepalign.data.resumable import model_fingerprint
from deepalign.diagnose.bootstrap import BootstrapOptions, Means
from deepalign.diagnose.figures import write_figures
from deepalign.diagnose.gradients import kinds, measure_gradients, measure_influence, measured_examples
from deepalign.diagnose.page import HOW_TO_READ, write_page
from deepalign.diagnose.positions import PositionOptions, analyse_positions
from deepalign.diagnose.report import claims, gradient_report, group_report, influence_report
from deepalign.diagnose.tokens import TokenNames
from deepalign.kernels.contrastive_sample import Space
from deepalign.models import (
    check_model_path,
    check_same_tokenizer,
    load_frozen_model,
    load_model_config,
    load_tokenizer,
    logits_width,
)
from deepalign.output_head import check_output_head
from deepalign.versions import versions

MOST_SERIES = 7  # styles of `deepalign/drawing.py`, less the base's
CONTRASTIVE = "contrastive"  # the name of the series on the first aligned model
HARMFUL, BENIGN = "harmful", "benign"


@dataclass(frozen=True)
class DiagnosisOptions:
    """What is measured.

    Attributes:
        positions: of the position-wise analysis; its `contrast` is set per series.
        contrast: (alpha, space): also contrastive decoding on the first aligned model.
        gradients, influence: contexts of the harmful group whose GradMag and whose Influence and Error are computed,
            for every series that is a model; 0 for none. They cost a backward pass per token.
        influence_layer: 0 for the embedding output.
        bootstrap: of the bands.
    """

    positions: PositionOptions = field(default_factory=PositionOptions)
    contrast: tuple[float, Space] | None = None
    gradients: int = 0
    influence: int = 0
    influence_layer: int = 0
    bootstrap: BootstrapOptions = field(default_factory=BootstrapOptions)

    def __post_init__(self) -> None:
        for name in ("gradients", "influence", "influence_layer"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.contrast is not None and not self.contrast[0] > 0:
            raise ValueError(f"contrast's alpha must be above 0, got {self.contrast[0]}")


@dataclass(frozen=True)
class Series:
    """One curve: a model, as it is or under contrastive decoding."""

    name: str
    path: str
    contrast: tuple[float, Space] | None = None


def load_pair_tokenizer(aligned: Mapping[str, str], base: str) -> PreTrainedTokenizerBase:
    """The first aligned model's tokenizer, checked to be every model's.

    Raises:
        FileNotFoundError: a model folder that does not exist.
        ValueError: tokenizers that differ, or no aligned model.
    """
    if not aligned:
        raise ValueError("there is no aligned model to compare with the base; give at least one")
    paths = {**aligned, "base": base}
    for name, path in paths.items():
        check_model_path(name, path)
    (first_name, first), *others = ((name, load_tokenizer(path)) for name, path in paths.items())
    for name, tokenizer in others:
        check_same_tokenizer(first_name, first, name, tokenizer)
    return first


def diagnose(
    aligned: Mapping[str, str],
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Mapping[str, Sequence[Context]],
    out: Path,
    options: DiagnosisOptions,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    described: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure, summarise, draw; returns what report.json holds.

    Args:
        aligned: name -> folder or hub id, in the order of the figures; the first is what the paper's claims are held
            against. The names "base" and "contrastive" are taken.
        base: folder or hub id.
        tokenizer: `load_pair_tokenizer`'s.
        contexts: "harmful", and if wanted "benign": contexts of `data/contexts.py`.
        out: the folder.
        options: what is measured.
        dtype, device: of the models.
        described: what the report says about the data besides counts; JSON.
        progress: show bars.

    Raises:
        FileNotFoundError, ValueError, TypeError: what does not fit, before anything long runs where it can be seen.
    """
    _check(aligned, contexts)
    if options.influence:
        _check_layer(aligned, options.influence_layer)
    series = [Series(name, path) for name, path in aligned.items()]
    if options.contrast is not None:
        series.insert(1, Series(CONTRASTIVE, series[0].path, options.contrast))
    if len(series) > MOST_SERIES:
        raise ValueError(
            f"{len(series)} curves cannot be told apart in one figure; compare at most {MOST_SERIES} at a time"
        )
    run = _Run(series, base, tokenizer, contexts, out, options, dtype, torch.device(device), progress)
    report = run.measure()
    report |= {"data": dict(described or {}), "reading": list(HOW_TO_READ)}
    write_text_atomic(out / "report.json", report_text(report))
    figures = write_figures(report, out / "figures")
    write_page(report, figures, out / "report.html")
    return report


def report_text(report: Mapping[str, Any]) -> str:
    """The report as JSON with a line per list of numbers."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


class _Run:
    """The state of one diagnosis."""

    def __init__(
        self,
        series: Sequence[Series],
        base: str,
        tokenizer: PreTrainedTokenizerBase,
        contexts: Mapping[str, Sequence[Context]],
        out: Path,
        options: DiagnosisOptions,
        dtype: torch.dtype,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.series, self.base_path, self.tokenizer, self.contexts = series, base, tokenizer, contexts
        self.out, self.options, self.dtype, self.device, self.progress = out, options, dtype, device, progress
        self.means: dict[str, dict[str, Mapping[str, Means]]] = {}

    def measure(self) -> dict[str, Any]:
        """All series on all groups; returns the report without its `data`."""
        base = self._load(self.base_path)
        report: dict[str, Any] = {"series": {}, "settings": self._settings(), "versions": versions()}
        loaded: tuple[str, PreTrainedModel] | None = None
        for series in self.series:
            if loaded is None or loaded[0] != series.path:
                loaded = None  # before the next one is loaded
                loaded = series.path, self._load(series.path)
            names = TokenNames(self.tokenizer, self._vocabulary(loaded[1], base))
            if "vocabulary_classes" not in report:
                report["vocabulary_classes"] = names.class_shares()
                self._settle(report["settings"]["positions"], names.size)
            report["series"][series.name] = self._one(series, loaded[1], base, names)
        contrastive = CONTRASTIVE if self.options.contrast is not None else None
        first = self.series[0].name
        report["claims"] = claims(self.means, report, first, contrastive, self.options.bootstrap)
        return report

    def _one(self, series: Series, model: PreTrainedModel, base: PreTrainedModel, names: TokenNames) -> dict[str, Any]:
        groups: dict[str, Any] = {}
        self.means[series.name] = {}
        found: dict[str, Any] = {"model": series.path, "contrast": series.contrast, "groups": groups}
        models = [model_fingerprint(series.path), model_fingerprint(self.base_path), str(self.dtype)]
        for number, (group, contexts) in enumerate(self.contexts.items()):
            path = self._path(series, group)
            record = analyse_positions(
                model,
                base,
                self.tokenizer,
                contexts,
                path,
                replace(self.options.positions, contrast=series.contrast),
                models=models,
                progress=self.progress,
                description=f"{series.name}, {group}",
            )
            # One seed per group: series are resampled together, groups apart.
            bootstrap = replace(self.options.bootstrap, seed=self.options.bootstrap.seed + number)
            groups[group], self.means[series.name][group] = group_report(path, record, len(contexts), bootstrap, names)
            if group == HARMFUL and series.contrast is None:
                found |= self._gradients(series, model, path, record, models)
        return found

    def _gradients(
        self, series: Series, model: PreTrainedModel, path: Path, record: np.dtype, models: list[Any]
    ) -> dict[str, Any]:
        """GradMag, Influence and Error of the first contexts, on the ids that were measured."""
        options, found = self.options, {}
        most = max(options.gradients, options.influence)
        if not most:
            return {}
        examples, deviations = measured_examples(self.contexts[HARMFUL], path, record, most)
        settings = {"models": models, "examples": [example.input_ids for example in examples]}
        positions, size = options.positions.positions, self._vocabulary(model)
        if options.gradients:
            target, chosen = path.with_suffix(".gradients"), examples[: options.gradients]
            kept = settings | {"examples": settings["examples"][: options.gradients]}
            kind = measure_gradients(model, chosen, target, positions, kept, size, self.progress)
            found["gradients"] = gradient_report(target, kind, len(chosen), kinds(model), options.bootstrap)
        if options.influence:
            target, chosen = path.with_suffix(".influence"), examples[: options.influence]
            kept = settings | {"examples": settings["examples"][: options.influence]}
            kind = measure_influence(
                model, chosen, deviations, target, positions, kept, options.influence_layer, size, self.progress
            )
            found["influence"] = influence_report(target, kind, len(chosen), options.influence_layer, options.bootstrap)
        return found

    def _load(self, path: str) -> PreTrainedModel:
        model = load_frozen_model(path, self.dtype)
        torch.nn.Module.to(model, self.device)
        check_output_head(model)
        return model

    def _vocabulary(self, *models: PreTrainedModel) -> int:
        given = self.options.positions.vocab_size
        return given or min(len(self.tokenizer), *(logits_width(model) for model in models))

    def _settle(self, positions: dict[str, Any], vocab_size: int) -> None:
        """What was asked for, as far as the vocabulary has it."""
        positions["vocab_size"] = vocab_size
        for name in ("top_n", "top_k"):
            positions[name] = min(positions[name], vocab_size)

    def _path(self, series: Series, group: str) -> Path:
        return self.out / "records" / f"{series.name}.{group}.records"

    def _settings(self) -> dict[str, Any]:
        return {
            "base": self.base_path,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            **asdict(self.options),
        }


def _check_layer(aligned: Mapping[str, str], layer: int) -> None:
    """Influence comes last: a layer that is not there is refused before hours of other measurements."""
    for name, path in aligned.items():
        layers = load_model_config(path).get_text_config().num_hidden_layers
        if layer > layers:
            raise ValueError(
                f"influence_layer is {layer}; expected 0 (the embedding output) to {layers}, the last layer of {name}"
            )


def _check(aligned: Mapping[str, str], contexts: Mapping[str, Sequence[Context]]) -> None:
    if HARMFUL not in contexts or not set(contexts) <= {HARMFUL, BENIGN}:
        raise ValueError(f"contexts are {sorted(contexts)}; expected 'harmful', and 'benign' if wanted")
    if not aligned:
        raise ValueError("there is no aligned model to compare with the base; give at least one")
    for name in aligned:
        if name in ("base", CONTRASTIVE) or not name or not all(c.isalnum() or c in "-_." for c in name):
            raise ValueError(
                f"the name {name!r} of an aligned model cannot be used; give letters, digits, '-', '_' and '.', and "
                f"neither 'base' nor '{CONTRASTIVE}'"
            )

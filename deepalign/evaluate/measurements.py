"""What the tables of a suite are made of, each measured once per seed, subject and setting, and kept.

A measurement has a folder named by a digest of everything that decides it. It holds answers and verdicts, which an
interrupted suite goes on with, and when it is done `result.json`, which is read instead of measuring again. Tables
share measurements: the prefill attack of Table 3's baseline is that of Table 2's.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepalign import __version__
from deepalign.data.chat import has_thinking_switch, with_thinking
from deepalign.data.files import write_text_atomic
from deepalign.data.resumable import model_fingerprint, read_object
from deepalign.defenses.lora import AdapterMethod, PlainLora
from deepalign.defenses.safe_lora import SafeLora
from deepalign.defenses.salora import SaLora
from deepalign.defenses.training import encode_conversations, mean_answer_loss
from deepalign.evaluate.answers import AnswerOptions
from deepalign.evaluate.families import Family
from deepalign.evaluate.finetune import finetune, split_rows
from deepalign.evaluate.gcg_attack import gcg_attack
from deepalign.evaluate.judges import make_judge
from deepalign.evaluate.outcomes import SCOPES
from deepalign.evaluate.prefill import count_outcomes, depth_name
from deepalign.evaluate.prefill_run import agreement, attacked, file_name
from deepalign.evaluate.reasoning import cross_tabulate, make_reasoning_judge, write_records
from deepalign.evaluate.recovery import Control, Reference, recover, recovery_config, save_merged
from deepalign.evaluate.subjects import LoadedSubject, Subject, load_subject
from deepalign.evaluate.suite_config import SuiteConfig

Depth = int | None
Result = dict[str, Any]
Work = Callable[[LoadedSubject, Path], Result]


@dataclass(frozen=True)
class SeedRun:
    """One seed of a suite.

    Attributes:
        config: of the suite.
        seed: of this run.
        folder: of its measurements and models.
        families: what there is to measure.
        progress: show bars.
    """

    config: SuiteConfig
    seed: int
    folder: Path
    families: list[Family]
    progress: bool = True

    # ---- subjects ----

    def subject(self, family: Family, method: str, model: str, alpha: float = 0.0, space: str = "logits") -> Subject:
        """A model of a family under the name of a method."""
        base = family.model("base", method) if alpha > 0 else None
        return Subject(
            name=f"{family.name} {method}",
            model=model,
            base=base,
            alpha=alpha,
            space=space,  # type: ignore[arg-type]  # one of the two, the table's settings say
            dtype=self.config.dtype,
            device=self.config.device,
        )

    def finetuned(self, family: Family, model: str, method: str = "lora") -> str:
        """`model` after fine-tuning on the family's benign data: a folder, made once.

        Args:
            family: whose data.
            model: folder or hub id.
            method: "lora", "salora" or "safe_lora".

        Raises:
            ValueError: the family has no benign data, or none to keep SaLoRA safe.
        """
        self._check_benign(family)
        adaptation = self.config.adaptation
        adapters: AdapterMethod
        if method == "salora":
            adapters = SaLora(family.safe, adaptation.salora)
        elif method == "safe_lora":
            base = family.model("base", "Safe LoRA")
            adapters = SafeLora(base, adaptation.safe_lora_threshold, adaptation.lora)
        else:
            adapters = PlainLora(adaptation.lora)
        settings = adaptation.training
        settings = replace(settings, sft=replace(settings.sft, seed=self.seed))
        identity = digest(settings, adapters.identity(), model_fingerprint(model), family.benign)
        name, models = f"{file_name(family.name)}-{method}-{identity}", self.folder / "models"
        adapter = models / f"{name}-adapter"
        if (models / name).exists():
            return str(models / name)
        self._say(f"{family.name}: fine-tuning, {method}")
        finetune(model, family.benign, adapter, settings, method=adapters, progress=self.progress)
        return str(save_merged(model, adapter, models / name, progress=False))

    def recovered(self, family: Family, degraded: str, reference: Reference, control: Control) -> str:
        """A degraded model after completion training: a folder, made once."""
        config = self.config
        values = {"seed": self.seed, **family.recovery}
        identity = digest(model_fingerprint(degraded), reference, control, values)
        name = f"{file_name(family.name)}-recovered-{identity}"
        training = recovery_config(
            degraded=degraded,
            original=family.model("aligned", "the recovery"),
            base=family.model("base", "the recovery"),
            output_dir=self.folder / "models" / name,
            reference=reference,
            control=control,
            **values,
        )
        final = Path(training.output_dir) / "final"
        if not final.exists():
            self._say(f"{family.name}: recovery, reference {reference}, control {control}")
            recover(training, ranks=config.recovery_ranks)
        return str(final)

    # ---- measurements ----

    def prefill(self, family: Family, subject: Subject, depths: list[Depth]) -> Result:
        """judges -> judge -> depth ("all": the whole target) -> scope -> counts; and their agreement."""
        settings = {"examples": _examples(family), "options": self.config.answers.fingerprint(), "depths": depths}

        def work(loaded: LoadedSubject, folder: Path) -> Result:
            judged = attacked(
                loaded, family.examples, depths, family.judges, self._answers, folder, progress=self.progress
            )
            names = dict.fromkeys(question.depth for question in judged.questions)
            return {
                "judges": {
                    spec: {
                        str(depth): {
                            scope: count_outcomes(
                                [v for v, q in zip(verdicts, judged.questions, strict=True) if q.depth == depth], scope
                            )
                            for scope in SCOPES
                        }
                        for depth in names
                    }
                    for spec, verdicts in judged.verdicts.items()
                },
                "agreement": agreement(judged),
            }

        return self.measured("prefill", subject, [settings, list(family.judges)], work)

    def outcomes(self, family: Family, subject: Subject, depth: Depth) -> dict[str, int]:
        """Counts of the first judge at one depth, of what the model wrote."""
        by_depth = self.prefill(family, subject, [depth])["judges"][family.judges[0]]
        counts: dict[str, int] = by_depth[depth_name(depth)]["continuation"]
        return counts

    def reasoning(self, family: Family, subject: Subject, depth: Depth) -> Result:
        """Counts of Table 5's cells; `first_reasons` says where answers reason."""
        judge = make_reasoning_judge(family.reasoning_judge)
        settings = {"examples": _examples(family), "options": self.config.answers.fingerprint(), "depth": depth}

        def work(loaded: LoadedSubject, folder: Path) -> Result:
            spec = family.harmful_judge
            judged = attacked(loaded, family.examples, [depth], [spec], self._answers, folder, progress=self.progress)
            result = cross_tabulate(judged.questions, judged.rows, judged.verdicts[spec], judge)
            write_records(result, folder / "reasoning.jsonl")
            return {"counts": result.counts(), "first_reasons": result.first_reasons}

        return self.measured("reasoning", subject, [settings, family.harmful_judge, family.reasoning_judge], work)

    def gcg(self, family: Family, subject: Subject) -> Result:
        """GCG: seed -> counts."""
        settings = self.config.gcg
        examples, universal_on = family.examples[: settings.requests], None
        if settings.universal_on is not None:
            universal_on = family.examples[settings.requests :][: settings.universal_on]
            if len(universal_on) < settings.universal_on:
                raise ValueError(
                    f"gcg: {settings.requests} requests to attack and {settings.universal_on} to find a suffix on are "
                    f"more than the {len(family.examples)} of {family.name}; lower either"
                )

        def work(loaded: LoadedSubject, folder: Path) -> Result:
            judge = make_judge(family.judges[0])
            assert callable(judge)  # tables.check_needs
            folder.mkdir(parents=True, exist_ok=True)
            result = gcg_attack(
                loaded.model,
                loaded.tokenizer,
                examples,
                judge=judge,
                settings=settings.search,
                seeds=settings.seeds,
                universal_on=universal_on,
                contrast=loaded.contrast,
                max_new_tokens=self.config.answers.max_new_tokens,
                batch_size=self.config.answers.batch_size,
                out=folder / "gcg.jsonl",
                progress=self.progress,
            )
            return {"counts": {str(seed): counts for seed, counts in result.counts.items()}}

        chosen = {name: value for name, value in asdict(settings).items() if value is not None}
        return self.measured("gcg", subject, [chosen, _examples(family), family.judges[0]], work)

    def eval_loss(self, family: Family, subject: Subject) -> float:
        """Mean cross entropy (nats) of the answer tokens of the benign conversations held out from fine-tuning."""
        self._check_benign(family)
        training = self.config.adaptation.training
        _, held_out = split_rows(family.benign, training.eval_share, self.seed)

        def work(loaded: LoadedSubject, folder: Path) -> Result:
            examples = encode_conversations(held_out, loaded.tokenizer, loaded.model, training.sft.max_length)
            return {"loss": mean_answer_loss(loaded.model, loaded.tokenizer, examples, training.eval_batch_size)}

        return float(self.measured("eval-loss", subject, [held_out, training.sft.max_length], work)["loss"])

    def utility(self, family: Family, subject: Subject) -> list[dict[str, Any]]:
        """Scores as plain values; none where the family has no utility."""
        utility = family.utility
        if utility is None:
            return []

        def work(loaded: LoadedSubject, folder: Path) -> Result:
            return {"scores": [asdict(score) for score in utility.scores(loaded, folder, self.progress)]}

        scores: list[dict[str, Any]] = self.measured("utility", subject, utility.fingerprint(), work)["scores"]
        return scores

    def measured(self, kind: str, subject: Subject, settings: Any, work: Work) -> Result:
        """The result of a measurement: from its folder, or by `work`, which may find half of it there."""
        thinking = [] if self.config.answers.thinking is None else [self.config.answers.thinking]
        identity = digest(kind, subject.fingerprint(), settings, __version__, *thinking)
        folder = self.folder / "measurements" / file_name(subject.name) / f"{kind}-{identity}"
        path = folder / "result.json"
        if not path.exists():
            self._say(f"{subject.name}: {kind}")
            started = time.perf_counter()
            with load_subject(subject) as loaded:
                found = work(self._settled(loaded), folder)
            seconds = round(time.perf_counter() - started, 2)
            result = {"kind": kind, "subject": asdict(subject), **found, "seconds": seconds}
            write_text_atomic(path, json.dumps(result, indent=1) + "\n")
        return read_object(path, "remove it, and what it says is measured again")

    @property
    def _answers(self) -> AnswerOptions:
        """How subjects answer; their tokenizers have their thinking settled."""
        return replace(self.config.answers, thinking=None)

    def _settled(self, loaded: LoadedSubject) -> LoadedSubject:
        """`answers.thinking` is for the families whose template has the switch, and must be set for them."""
        if not has_thinking_switch(loaded.tokenizer):
            return loaded
        return replace(loaded, tokenizer=with_thinking(loaded.tokenizer, self.config.answers.thinking))

    def _check_benign(self, family: Family) -> None:
        if not family.benign:
            raise ValueError(f"{family.name} has no conversations to fine-tune on; set data.benign")

    def _say(self, what: str) -> None:
        print(f"== seed {self.seed}: {what}", flush=True)


def digest(*parts: Any) -> str:
    """Ten hexadecimal digits that stand for plain values and dataclasses."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=asdict).encode()).hexdigest()[:10]


def _examples(family: Family) -> list[dict[str, str]]:
    return [asdict(example) for example in family.examples]

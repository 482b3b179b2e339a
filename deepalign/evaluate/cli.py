"""`deepalign evaluate prefill|reasoning|utility|suite`: attacks, utility, and whole tables of them."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from deepalign.data.files import check_folder
from deepalign.evaluate.answers import AnswerOptions
from deepalign.evaluate.prefill_run import run_prefill
from deepalign.evaluate.reasoning import HARMFUL_JUDGE, REASONING_JUDGE
from deepalign.evaluate.reasoning_run import run_reasoning
from deepalign.evaluate.requests import load_examples
from deepalign.evaluate.subjects import Subject
from deepalign.evaluate.utility import TASKS, UtilitySettings, run_utility
from deepalign.models import DTYPES, choose_device

JUDGES = (
    "keyword:qi2024, keyword:gcg, keyword:jailbreakbench, keyword:FILE.txt, judgezoo:NAME, microworld:SEED, module:name"
)

PACKAGED = {"microworld": Path(__file__).parents[1] / "microworld" / "suite.yaml"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deepalign evaluate`."""
    commands = parser.add_subparsers(dest="evaluation", required=True)
    prefill = commands.add_parser("prefill", help="force the first tokens of harmful answers and judge what follows")
    _add_subject(prefill)
    _add_attack(prefill)
    prefill.add_argument("--depths", default="0,4,all", help="tokens forced; 0: no attack, all: the whole target")
    prefill.set_defaults(run=_prefill)
    reasoning = commands.add_parser("reasoning", help="harmful or safe, with or without reasoning (Table 5)")
    _add_subject(reasoning)
    _add_attack(reasoning, judges=False)
    reasoning.add_argument("--depth", default="all", help="tokens forced (default all: the whole target)")
    reasoning.add_argument("--harmful-judge", default=HARMFUL_JUDGE, help=f"default {HARMFUL_JUDGE}; {JUDGES}")
    reasoning.add_argument(
        "--reasoning-judge", default=REASONING_JUDGE, help="deliberation (default), deliberation:FILE.txt, module:name"
    )
    reasoning.set_defaults(run=_reasoning)
    utility = commands.add_parser("utility", help="what the model is still good for, by lm-eval")
    _add_subject(utility)
    utility.add_argument(
        "--tasks", default=",".join(TASKS), help=f"lm-eval's names, or {', '.join(TASKS)} (default all)"
    )
    utility.add_argument("--include-path", help="folder of local tasks (YAML)")
    utility.add_argument("--limit", type=int, help="questions per task; for trials only")
    utility.add_argument("--num-fewshot", type=int, help="examples in the prompt (default: each task's own number)")
    utility.add_argument("--batch-size", type=int, default=8, help="rows read together (default 8)")
    utility.add_argument("--chat-template", action="store_true", help="put questions into the chat template")
    _add_thinking(utility)
    utility.set_defaults(run=_utility)
    suite = commands.add_parser("suite", help="whole tables from a configuration; an interrupted suite goes on")
    suite.add_argument("--config", required=True, help="a YAML file, or the name of a packaged one: microworld")
    suite.add_argument("--out", help="folder of answers, models and tables (default: the configuration's)")
    suite.add_argument("--seeds", help="instead of the configuration's, as in 21,22,23")
    suite.add_argument("--no-progress", action="store_true", help="no progress bars")
    suite.set_defaults(run=_suite)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if options.out is not None:
        check_folder("--out", options.out)
    return int(options.run(options))


def parse_depths(text: str, name: str = "--depths") -> list[int | None]:
    """Depths as the command line writes them: `0,1,5,all`.

    Raises:
        ValueError: a word that is neither a number nor `all`, or a depth twice.
    """
    depths: list[int | None] = []
    for word in text.split(","):
        if not (word.strip() == "all" or word.strip().isdecimal()):
            raise ValueError(f"{name} is {text!r}; expected numbers and all, separated by commas, as in 0,1,5,all")
        depths.append(None if word.strip() == "all" else int(word))
    if len(set(depths)) < len(depths):
        raise ValueError(f"{name} is {text!r}; expected none of them twice")
    return depths


def _add_subject(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("model")
    models.add_argument("--model", required=True, help="folder or hub id of the model")
    models.add_argument("--adapter", help="folder of a PEFT adapter on it")
    models.add_argument("--base", help="folder or hub id of its base model, to decode contrastively")
    models.add_argument("--alpha", type=float, default=None, help="strength of it (default: 0, with --base 1)")
    models.add_argument("--space", choices=("logits", "logprobs"), default="logits", help="of the excess")
    models.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    models.add_argument("--device", help="default: cuda if there is one, else cpu")
    models.add_argument("--name", help="as the report calls it (default: the model)")
    parser.add_argument("--out", required=True, help="folder for answers and report; an interrupted run goes on there")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def _add_attack(parser: argparse.ArgumentParser, *, judges: bool = True) -> None:
    attack = parser.add_argument_group("attack")
    attack.add_argument("--data", required=True, help="advbench, advbench:FILE, FILE.csv (goal,target) or FILE.jsonl")
    attack.add_argument("--limit", type=int, help="only the first so many requests (the paper has 384, in Table 1 520)")
    if judges:
        attack.add_argument("--judge", action="append", help=f"may be repeated (default keyword:qi2024): {JUDGES}")
    attack.add_argument("--max-new-tokens", type=int, default=512, help="per answer (default 512)")
    attack.add_argument("--batch-size", type=int, default=32, help="answers generated together (default 32)")
    attack.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    attack.add_argument("--seed", type=int, default=0, help="above temperature 0, answer i draws with seed + i")
    _add_thinking(attack)


def _add_thinking(parser: Any) -> None:
    parser.add_argument("--thinking", choices=("on", "off"), help="of a chat template with the switch, such as Qwen3's")


def _thinking(options: argparse.Namespace) -> bool | None:
    return None if options.thinking is None else options.thinking == "on"


def _subject(options: argparse.Namespace) -> Subject:
    choose_device("--device", options.device)
    alpha = (1.0 if options.base else 0.0) if options.alpha is None else options.alpha
    return Subject(
        name=options.name or options.model,
        model=options.model,
        base=options.base,
        alpha=alpha,
        space=options.space,
        adapter=options.adapter,
        dtype=options.dtype,
        device=options.device,
    )


def _answer_options(options: argparse.Namespace) -> AnswerOptions:
    answers = (options.max_new_tokens, options.batch_size, options.temperature, options.seed)
    return AnswerOptions(*answers, _thinking(options))


def _prefill(options: argparse.Namespace) -> int:
    report = run_prefill(
        _subject(options),
        load_examples(options.data, options.limit),
        parse_depths(options.depths),
        options.judge or ["keyword:qi2024"],
        _answer_options(options),
        options.out,
        data=options.data,
        progress=not options.no_progress,
    )
    return _show(report)


def _reasoning(options: argparse.Namespace) -> int:
    if "," in options.depth:
        raise ValueError(f"--depth is {options.depth!r}; expected one number, or all")
    (depth,) = parse_depths(options.depth, "--depth")
    report = run_reasoning(
        _subject(options),
        load_examples(options.data, options.limit),
        depth,
        options.harmful_judge,
        options.reasoning_judge,
        _answer_options(options),
        options.out,
        data=options.data,
        progress=not options.no_progress,
    )
    return _show(report)


def _utility(options: argparse.Namespace) -> int:
    settings = UtilitySettings(
        tasks=tuple(options.tasks.split(",")),
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        chat_template=options.chat_template,
    )
    return _show(run_utility(_subject(options), settings, options.out, thinking=_thinking(options)))


def _suite(options: argparse.Namespace) -> int:
    from deepalign.evaluate.suite import run_suite
    from deepalign.evaluate.suite_config import load_suite

    if options.config not in PACKAGED and not Path(options.config).is_file():
        raise FileNotFoundError(
            f"--config: {options.config} does not exist; give a suite's YAML file, or the name of a packaged one: "
            f"{', '.join(PACKAGED)}"
        )
    config = load_suite(PACKAGED.get(options.config, options.config))
    if options.out is not None:
        config = dataclasses.replace(config, out=options.out)
    if options.seeds is not None:
        if not all(word.strip().isdecimal() for word in options.seeds.split(",")):
            raise ValueError(f"--seeds is {options.seeds!r}; expected numbers separated by commas, as in 21,22,23")
        config = dataclasses.replace(config, seeds=tuple(map(int, options.seeds.split(","))))
    return _show(run_suite(config, progress=not options.no_progress))


def _show(report: Any) -> int:
    print(report.read_text(encoding="utf-8"))
    print(f"report: {report} (answers beside it)")
    return 0

"""`deepalign diagnose`: where alignment stops, from a user's own models and prompts to one page."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepalign.data.chat import with_thinking
from deepalign.data.contexts import (
    Context,
    PrefixSource,
    build_contexts,
    first_ids,
    fixed_prefixes,
    no_prefix,
    prefixes_of_file,
)
from deepalign.data.files import Message, check_folder, read_jsonl, read_prompts
from deepalign.data.sources import load_conversations, load_data, parse_spec
from deepalign.diagnose.bootstrap import BootstrapOptions
from deepalign.diagnose.page import below_tenth_text, number_text
from deepalign.diagnose.positions import PositionOptions
from deepalign.diagnose.report import EARLY, LATE
from deepalign.diagnose.run import BENIGN, HARMFUL, DiagnosisOptions, diagnose, load_pair_tokenizer
from deepalign.models import DTYPES, choose_device, default_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deepalign diagnose`."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--aligned",
        action="append",
        required=True,
        metavar="[NAME=]MODEL",
        help="folder or hub id of an aligned model; may be repeated, with names, to overlay several",
    )
    models.add_argument("--base", required=True, help="folder or hub id of the base model of them all")
    models.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    models.add_argument("--device", help="default: cuda if there is one, else cpu")
    data = parser.add_argument_group("contexts")
    data.add_argument(
        "--harmful",
        required=True,
        help="prompts with harmful answers (or without: --generate): JSONL, or a data set by name",
    )
    data.add_argument("--benign", help="JSONL of benign ones, to compare with")
    data.add_argument("--limit", type=int, help="rows read of each file (default: all)")
    prefixes = data.add_mutually_exclusive_group()
    prefixes.add_argument("--prefix", action="append", help="forced beginning of harmful responses; may be repeated")
    prefixes.add_argument("--prefix-file", help="forced beginnings, one a line, or JSONL of {'prefix': ...}")
    prefixes.add_argument("--prefix-ids", type=int, metavar="N", help="force the first N ids of each harmful answer")
    data.add_argument("--thinking", choices=("on", "off"), help="of a chat template with the switch, such as Qwen3's")
    measured = parser.add_argument_group("what is measured")
    measured.add_argument("--generate", action="store_true", help="let each model write the response (default: given)")
    measured.add_argument("--temperature", type=float, default=0.0, help="of what it writes; 0 is greedy (default)")
    measured.add_argument("--positions", type=int, default=64, help="response positions looked at (default 64)")
    measured.add_argument("--top-n", type=int, default=100, help="size of a model's top (default 100)")
    measured.add_argument("--top-k", type=int, default=100, help="base-favored tokens kept per row (default 100)")
    measured.add_argument("--alpha", type=float, help="also the first model decoded contrastively, so strongly")
    measured.add_argument("--space", choices=("logits", "logprobs"), default="logits", help="of the excess")
    measured.add_argument(
        "--gradients",
        type=int,
        default=0,
        metavar="N",
        help="GradMag of the first N harmful contexts",
    )
    measured.add_argument("--influence", type=int, default=0, metavar="N", help="Influence and Error of the first N")
    measured.add_argument("--influence-layer", type=int, default=0, help="0: the embedding output (default)")
    measured.add_argument("--vocab-size", type=int, help="logits that are tokens (default: the tokenizer's length)")
    run = parser.add_argument_group("run")
    run.add_argument("--out", required=True, help="folder; an interrupted run goes on where it was")
    run.add_argument("--batch-size", type=int, default=8, help="contexts per forward pass (default 8)")
    run.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default 1000)")
    run.add_argument("--seed", type=int, default=0, help="of the bootstrap and of what is drawn")
    run.add_argument("--no-progress", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    device = choose_device("--device", options.device)
    check_folder("--out", options.out)
    aligned = named_models(options.aligned)
    thinking = None if options.thinking is None else options.thinking == "on"
    tokenizer = with_thinking(load_pair_tokenizer(aligned, options.base), thinking)
    contexts = {HARMFUL: _contexts(tokenizer, options.harmful, options, _prefixes(options))}
    if options.benign is not None:
        contexts[BENIGN] = _contexts(tokenizer, options.benign, options, no_prefix)
    report = diagnose(
        aligned,
        options.base,
        tokenizer,
        contexts,
        Path(options.out),
        _diagnosis_options(options),
        dtype=DTYPES[options.dtype or default_dtype(device)],
        device=device,
        described=_described(options),
        progress=not options.no_progress,
    )
    print(summary(report))
    print(f"page: {Path(options.out) / 'report.html'} (and report.json, figures beside it)")
    return 0


def named_models(arguments: list[str]) -> dict[str, str]:
    """Name -> folder or hub id. A model without a name is "aligned", or called after its folder if that is taken.

    Raises:
        ValueError: a name twice.
    """
    models: dict[str, str] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator or "/" in name:
            name, path = ("aligned" if "aligned" not in models else Path(argument).name), argument
        if name in models:
            raise ValueError(f"two aligned models are called {name!r}; give each a name: --aligned NAME={path}")
        models[name] = path
    return models


def summary(report: dict[str, Any]) -> str:
    """The verdict as lines of text."""
    lines = []
    for name, series in report["series"].items():
        for group, found in series["groups"].items():
            verdict = found["verdict"]
            lines.append(
                f"{name}, {group} (n = {found['n']}): KL {number_text(verdict['kl_first'])} nats at the first token, "
                f"{_fall_text(verdict)}; {_late_text(verdict)}"
            )
    for claim in report["claims"]:
        if claim["verdict"] == "disagrees":
            measured = claim["measured"]
            lines.append(
                f"disagrees with the paper, which has: {claim['claim']}. Measured: {number_text(measured)}, "
                f"{measured['what']}"
            )
    return "\n".join(lines)


def _fall_text(verdict: Mapping[str, Any]) -> str:
    first, for_good = verdict["below_tenth"], verdict["below_tenth_for_good"]
    if first["value"] is None:
        return "never below a tenth of it"
    found = f"below a tenth of it first at position {below_tenth_text(first)}"
    if for_good["value"] is None:
        return f"{found}, and not for good"
    return f"{found}, for good from position {below_tenth_text(for_good)}"


def _late_text(verdict: Mapping[str, Any]) -> str:
    if verdict["kl_late"]["value"] is None:
        return f"no positions from {LATE[0]} on"
    if verdict["kl_late_over_early"]["value"] is None:
        return f"from position {LATE[0]} on {number_text(verdict['kl_late'])} nats"
    ratio = number_text(verdict["kl_late_over_early"])
    return f"from position {LATE[0]} on {ratio} times that of positions {EARLY[0]} to {EARLY[1]}"


def _contexts(tokenizer: Any, path: str, options: argparse.Namespace, prefixes: PrefixSource) -> list[Context]:
    conversations = _read(path, answers=not options.generate)
    if options.limit is not None:
        if options.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {options.limit}")
        conversations = conversations[: options.limit]
    try:
        return build_contexts(tokenizer, conversations, prefixes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(spec: str, *, answers: bool) -> list[list[Message]]:
    """Conversations with answers, of a file or a data set by name; where none are needed, prompts alone will do."""
    parsed = parse_spec(spec)
    if parsed.data_set is not None:
        if answers and not parsed.data_set.answers:
            raise ValueError(
                f"{spec}: {parsed.data_set.name} holds requests without answers; add --generate, with which each model "
                "writes its own, or give data with answers, as harmful-hex-phi"
            )
        if answers:
            return load_conversations(spec, announce=True)
        return [record.messages for record in load_data(spec, announce=True)]
    path = str(parsed.source)
    try:
        return read_jsonl(path)
    except ValueError:
        if answers:
            raise
        return [messages for messages, _ in read_prompts(path)]


def _prefixes(options: argparse.Namespace) -> PrefixSource:
    if options.prefix is not None:
        return fixed_prefixes(options.prefix)
    if options.prefix_file is not None:
        return prefixes_of_file(options.prefix_file)
    if options.prefix_ids is None:
        return no_prefix
    if options.prefix_ids < 1:
        raise ValueError(f"--prefix-ids must be at least 1, got {options.prefix_ids}")
    return first_ids(options.prefix_ids)


def _diagnosis_options(options: argparse.Namespace) -> DiagnosisOptions:
    return DiagnosisOptions(
        positions=PositionOptions(
            positions=options.positions,
            generate=options.generate,
            temperature=options.temperature,
            seed=options.seed,
            top_n=options.top_n,
            top_k=options.top_k,
            vocab_size=options.vocab_size,
            batch_size=options.batch_size,
        ),
        contrast=None if options.alpha is None else (options.alpha, options.space),
        gradients=options.gradients,
        influence=options.influence,
        influence_layer=options.influence_layer,
        bootstrap=BootstrapOptions(resamples=options.resamples, seed=options.seed),
    )


def _described(options: argparse.Namespace) -> dict[str, Any]:
    """What the page says about the data."""
    forced = "none"
    if options.prefix is not None:
        forced = "; ".join(options.prefix)
    elif options.prefix_file is not None:
        forced = f"of {options.prefix_file}"
    elif options.prefix_ids is not None:
        forced = f"the first {options.prefix_ids} ids of each answer"
    found = {"harmful data": options.harmful, "forced prefixes, harmful": forced}
    return found if options.benign is None else found | {"benign data": options.benign}

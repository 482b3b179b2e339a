"""`deepalign sample`: talk to a contrastively decoded model, or answer a file of prompts."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepalign.models import (
    DTYPES,
    check_model_path,
    choose_device,
    default_dtype,
    load_adapter,
    load_adapter_config,
    load_frozen_model,
    load_tokenizer,
)
from deepalign.sampling.batch_run import read_rows, run_batch
from deepalign.sampling.sampler import ContrastiveSampler, check_drawing, check_length

HELP = "commands: /reset starts a new conversation, /quit (or end of input) leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deepalign sample`."""
    models = parser.add_argument_group("models")
    models.add_argument("--aligned", help="folder or hub id of the aligned model")
    models.add_argument("--base", help="folder or hub id of its base model; not needed for --alpha 0")
    models.add_argument("--adapter", help="instead of --aligned: a PEFT adapter on --base, in one set of weights")
    models.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    models.add_argument("--device", help="default: cuda if there is one, else cpu")
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "--alpha", type=float, default=1.0, help="how much of the base's excess is taken off (default 1)"
    )
    drawing.add_argument("--space", choices=("logits", "logprobs"), default="logits", help="of the excess")
    drawing.add_argument("--temperature", type=float, default=1.0, help="0: the most probable token (default 1)")
    drawing.add_argument("--top-k", type=int, default=0, help="0: all (default)")
    drawing.add_argument("--top-p", type=float, default=1.0, help="1: all (default)")
    drawing.add_argument("--min-p", type=float, default=0.0, help="0: all (default)")
    drawing.add_argument("--max-new-tokens", type=int, default=256, help="per answer (default 256)")
    drawing.add_argument("--stop", action="append", default=[], help="text that ends an answer; may be repeated")
    drawing.add_argument("--seed", type=int, default=0, help="row i of a file, or answer i, draws with seed + i")
    drawing.add_argument("--system", help="system message")
    files = parser.add_argument_group("files (without them: interactive)")
    files.add_argument("--input", help='JSONL of {"prompt": ...} or {"messages": [...]}')
    files.add_argument("--out", "--output", help="JSONL of answers; an interrupted run goes on where it was")
    files.add_argument("--batch-size", type=int, default=16, help="rows answered together (default 16)")
    files.add_argument("--stats", action="store_true", help="also how much of the distribution the penalty moved")
    files.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if (options.input is None) != (options.out is None):
        raise ValueError("--input and --out go together; give both, or neither to talk to the model")
    if options.out is not None and Path(options.out).is_dir():
        raise IsADirectoryError(f"--out: {options.out} is a folder; give the path of a JSONL file")
    # refused before a model is loaded
    check_drawing(options.alpha, options.temperature, options.top_k, options.top_p, options.min_p, options.space)
    check_length(options.max_new_tokens)
    if options.input is not None:
        read_rows(options.input, options.batch_size)
    sampler = load_sampler(options)
    if options.input is None:
        chat(sampler, options)
        return 0
    answered = run_batch(
        sampler,
        options.input,
        options.out,
        models=[options.aligned, options.base, options.adapter],
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        stop=options.stop,
        seed=options.seed,
        system=options.system,
        return_stats=options.stats,
        progress=not options.no_progress,
    )
    print(f"answered {answered} rows; answers in {options.out}")
    return 0


def load_sampler(options: argparse.Namespace) -> ContrastiveSampler:
    """Load the models that the options name.

    Raises:
        OSError: a model or an adapter that is not there.
        ValueError: no such device, no model to align or to contrast with, tokenizers that differ, or a drawing option
            out of range.
    """
    if (options.aligned is None) == (options.adapter is None):
        raise ValueError("give either --aligned, or --adapter with the --base it belongs to")
    if options.base is None and (options.adapter is not None or options.alpha > 0):
        raise ValueError("give --base, the base model (without --adapter and with --alpha 0 none is needed)")
    paths = {"--aligned": options.aligned} if options.adapter is None else {}
    if options.adapter is not None or options.alpha > 0:
        paths["--base"] = options.base
    device = choose_device("--device", options.device)
    for name, path in paths.items():
        check_model_path(name, path)
    if options.adapter is not None:
        load_adapter_config(options.adapter)  # refused before a model is loaded
    tokenizers = [load_tokenizer(path) for path in paths.values()]
    dtype = DTYPES[options.dtype or default_dtype(device)]
    models: list[Any] = [load_frozen_model(path, dtype) for path in paths.values()]
    for model in models:
        model.to(device)
    if options.adapter is not None:
        models[0] = load_adapter(models[0], options.adapter)
    return ContrastiveSampler(
        models[0],
        models[1] if len(models) > 1 else None,
        tokenizers[0],
        alpha=options.alpha,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        space=options.space,
        base_tokenizer=tokenizers[-1],
    )


def chat(
    sampler: ContrastiveSampler, options: argparse.Namespace, read: Callable[[str], str] = input
) -> list[dict[str, str]]:
    """Talk until the end of the input; returns the last conversation.

    Args:
        sampler: with a tokenizer.
        options: of the command.
        read: asks for a line, raises EOFError at the end of the input.
    """
    opening = [] if options.system is None else [{"role": "system", "content": options.system}]
    messages, answers = list(opening), 0
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return messages
        if line == "/quit":
            return messages
        if line == "/reset":
            messages = list(opening)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                messages = [*asked, {"role": "assistant", "content": _answer(sampler, options, asked, answers)}]
                answers += 1
            except ValueError as error:  # a conversation that has outgrown the context can be reset
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print("\n(interrupted: this turn is forgotten)", file=sys.stderr)


def _answer(sampler: ContrastiveSampler, options: argparse.Namespace, messages: list[dict[str, str]], turn: int) -> str:
    """Print an answer as it is drawn."""
    text = ""
    for token in sampler.stream(
        messages, max_new_tokens=options.max_new_tokens, stop=options.stop, seed=options.seed + turn
    ):
        print(token.text, end="", flush=True)
        text += token.text
    print()
    return text

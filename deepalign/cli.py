"""The command line: `deepalign demo|diagnose|sample|evaluate|sweep|cache-teacher|merge`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# Name: where its options and its `run` are, what it does in a line, and whether `run` also takes words that it does not
# know (they override keys of a configuration). Modules are imported when their command is called: most load torch.
COMMANDS = {
    "demo": ("deepalign.microworld.cli", "the whole method on a small invented world, in minutes on two cores", False),
    "diagnose": ("deepalign.diagnose.cli", "where alignment stops, position by position: figures and a page", False),
    "sample": ("deepalign.sampling.cli", "contrastive decoding: talk to a model, or answer a file of prompts", False),
    "evaluate": ("deepalign.evaluate.cli", "attacks, judges, utility, and the paper's tables", False),
    "sweep": ("deepalign.train.sweep", "one training per cell of a grid of settings, and a table", True),
    "cache-teacher": ("deepalign.train.cache_cli", "the teachers' hidden states, once, before training", False),
    "merge": ("deepalign.train.merge", "one model of a LoRA adapter and its base model", False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (2: refused, with one message on stderr; 130: stopped by Ctrl-C)."""
    parser = argparse.ArgumentParser(prog="deepalign", description="deep safety alignment of language models")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, summary, _) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    # a command's own words are for its own parser
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = parser.parse_args(words[:1]).command
    where, summary, overridable = COMMANDS[name]
    try:
        module = _module(where)
        if hasattr(module, "main"):  # launchers start it too: it knows which rank says what went wrong
            return int(module.main(words[1:]))
        own = argparse.ArgumentParser(prog=f"deepalign {name}", description=summary, allow_abbrev=False)
        module.add_arguments(own)
        options, overrides = own.parse_known_args(words[1:]) if overridable else (own.parse_args(words[1:]), None)
        if getattr(options, "no_progress", False):
            _hide_loading_bars()
        return int(module.run(options, *([overrides] if overridable else [])))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command again goes on from what was written", file=sys.stderr)
        return 130


def _module(name: str) -> Any:
    missing = [package for package in ("torch", "transformers", "yaml") if find_spec(package) is None]
    if missing:
        raise RuntimeError(f"this command needs {', '.join(missing)}; `pip install '.[train]'` in a checkout")
    return import_module(name)


def _hide_loading_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # the hub's too


if __name__ == "__main__":
    sys.exit(main())

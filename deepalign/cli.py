"""The command line: `deepalign demo|sample|evaluate`."""

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (2: refused, with one message on stderr)."""
    parser = argparse.ArgumentParser(prog="deepalign", description="deep safety alignment of language models")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the whole method on a small invented world, in minutes on two CPU cores")
    demo.add_argument("--out", default="runs/demo", help="folder for models, answers and the report")
    demo.add_argument("--seed", type=int, default=None, help="first seed (default: the one in the settings)")
    demo.add_argument("--seeds", type=int, default=1, help="number of seeds to run and report")
    demo.add_argument("--config", default=None, help="a settings file instead of the package's demo.yaml")
    demo.add_argument("--no-progress", action="store_true", help="no progress bars")
    commands.add_parser(
        "sample", help="contrastive decoding: talk to a model, or answer a file of prompts", add_help=False
    )
    commands.add_parser("evaluate", help="attacks, judges, utility, and the paper's tables", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.command in ("sample", "evaluate"):
            return _sample(rest) if options.command == "sample" else _evaluate(rest)
        return _demo(parser.parse_args(arguments))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _demo(options: argparse.Namespace) -> int:
    import dataclasses

    from deepalign.microworld.demo import SETTINGS, load_settings, run_demo

    settings = load_settings(options.config or SETTINGS)
    if options.seed is not None:
        settings = dataclasses.replace(settings, seed=options.seed)
    report = run_demo(options.out, settings, seeds=options.seeds, progress=not options.no_progress)
    print(report.read_text(encoding="utf-8"))
    print(f"report: {report} (and report.json, plots beside it)")
    return 0


def _sample(arguments: Sequence[str]) -> int:
    from deepalign.sampling.cli import add_arguments, run  # imports torch and transformers, which takes seconds

    parser = argparse.ArgumentParser(prog="deepalign sample", description="contrastive decoding (Eq. 7)")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def _evaluate(arguments: Sequence[str]) -> int:
    from deepalign.evaluate.cli import add_arguments, run

    parser = argparse.ArgumentParser(prog="deepalign evaluate", description="attacks, judges, utility, whole tables")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())

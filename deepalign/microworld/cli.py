"""`deepalign demo`."""

import argparse
import dataclasses

from deepalign.data.files import check_folder
from deepalign.microworld.demo import SETTINGS, load_settings, run_demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deepalign demo`."""
    parser.add_argument("--out", default="runs/demo", help="folder for models, answers, report (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=None, help="first seed (default: the one in the settings)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds to run and report (default: 1)")
    parser.add_argument("--config", default=None, help="a settings file instead of the package's demo.yaml")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Run the demo and print its report."""
    check_folder("--out", options.out)
    settings = load_settings(options.config or SETTINGS)
    if options.seed is not None:
        settings = dataclasses.replace(settings, seed=options.seed)
    report = run_demo(options.out, settings, seeds=options.seeds, progress=not options.no_progress)
    print(report.read_text(encoding="utf-8"))
    print(f"report: {report} (and report.json, plots beside it)")
    return 0

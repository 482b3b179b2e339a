"""Targeted completion training, the entry point.

    deepspeed deepalign/train/run.py --config X.yaml [--key value ...]     # from a checkout
    deepspeed --module deepalign.train.run --config X.yaml                 # from an installed package
    python -m deepalign.train.run --config X.yaml                          # one process, without the launcher

What happens, in order: read and check the configuration, check this machine, read and encode the data, load the frozen
teachers, load the student (`prepare.py`), train, from the last checkpoint where there is one (`trainer.py`), write
`final/`. Everything that can be refused is refused before the models are trained, in one message.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from deepalign.data.files import write_text_atomic
from deepalign.train.checkpoints import FINAL, METRICS_FILE, SUMMARY_FILE
from deepalign.train.config import TrainConfig, config_as_dict, load_config
from deepalign.train.config_keys import keys_as_text
from deepalign.train.nonfinite import TrainingStopped
from deepalign.train.prepare import Run, prepare
from deepalign.train.preview import add_preview_arguments, preview
from deepalign.versions import versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training from the command line.

    Returns:
        The exit code: 0; 2 for what was refused before training, 1 for a training that stopped, each with one message
        on stderr.
    """
    parser = argparse.ArgumentParser(
        description="targeted completion training",
        epilog=f"keys of the configuration:\n{keys_as_text(TrainConfig)}".replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file; any of its keys can follow as --key value")
    add_preview_arguments(parser)
    parser.add_argument("--local_rank", type=int, default=None, help="set by the launcher")
    known, overrides = parser.parse_known_args(arguments)
    with contextlib.ExitStack() as held:
        return _run(known, overrides, held)


def _run(known: argparse.Namespace, overrides: Sequence[str], held: contextlib.ExitStack) -> int:
    try:
        config = load_config(known.config, overrides)
        if preview(known, config):
            return 0
        run = prepare(config, held)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        train(run)
    except TrainingStopped as error:
        # Of every rank: a disk may be full on one machine only. On a line of its own, below the progress bar.
        print(f"\nerror: rank {run.trainer.args.process_index}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def train(run: Run) -> None:
    """Train to the end and write `final/` and `run.json`."""
    trainer = run.trainer
    trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    output_dir = Path(run.config.output_dir)
    trainer.save_final(output_dir / FINAL)
    trainer.restore_forward()
    if trainer.is_world_process_zero():
        summary = {
            "config": config_as_dict(run.config),
            "steps": trainer.state.global_step,
            "world_size": trainer.args.world_size,
            "versions": versions(),
            "speed": trainer.speed.summary() or _speed_before(output_dir / SUMMARY_FILE),
        }
        try:
            write_text_atomic(output_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            raise trainer.cannot_write(SUMMARY_FILE, error) from error
        print(f"trained {summary['steps']} steps; model: {output_dir / FINAL}, metrics: {output_dir / METRICS_FILE}")


def _speed_before(path: Path) -> dict[str, float]:
    """What a finished run says: starting it again trains no step that could be timed."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["speed"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


if __name__ == "__main__":
    sys.exit(main())

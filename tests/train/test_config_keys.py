"""The keys that `run.py --help` and docs/training-keys.md list are those that a configuration takes."""

import dataclasses
from dataclasses import dataclass, field

import pytest
import yaml

from deepalign.train.config import TrainConfig, load_config
from deepalign.train.config_keys import REQUIRED, Key, keys_as_markdown, keys_as_text, keys_of
from deepalign.train.run import main


@dataclass(frozen=True)
class Inner:
    """A block.

    Attributes:
        depth: how deep.
    """

    depth: int = 3


@dataclass(frozen=True)
class Outer:
    """A configuration.

    Attributes:
        name: of it, which goes
            on here; and: on.
        inner: a block, see docs/loss.md.
        rates: of 100%.

    Raises:
        ValueError: never.
    """

    name: str
    inner: Inner = field(default_factory=Inner)
    rates: tuple[float, ...] | None = None


KEYS = [
    Key("name", "text", REQUIRED, "of it, which goes on here; and: on."),
    Key("inner", "keys", "", "a block, see docs/loss.md."),
    Key("inner.depth", "integer", "3", "how deep."),
    Key("rates", "list, null", "null", "of 100%."),
]


def test_keys_of_a_configuration():
    assert list(keys_of(Outer)) == KEYS
    assert "| `inner` | keys | | a block, see [loss](loss.md). |" in keys_as_markdown(Outer).splitlines()
    assert "  inner.depth  [integer; default 3]\n      how deep." in keys_as_text(Outer)


def test_a_key_without_explanation_is_an_error():
    added = dataclasses.make_dataclass("Added", [("speed", int, 1)], bases=(Outer,), frozen=True, kw_only=True)
    added.__doc__ = Outer.__doc__
    with pytest.raises(ValueError, match="does not explain speed"):
        list(keys_of(added))


def test_every_default_of_a_training_can_be_written_as_listed(tmp_path):
    """The listed keys, written into a file with their listed defaults, are the default configuration."""
    given = {"aligned": "a", "base": "b", "output_dir": "o", "harmful_data": "h", "utility_data": "u"}
    lines = {key.name: key.default for key in keys_of(TrainConfig)}
    assert [name for name, default in lines.items() if default == REQUIRED] == list(given)[:4]
    words = [
        word
        for name, default in lines.items()
        if default not in ("", REQUIRED) and not name.startswith("lora.") and name not in given
        for word in (f"--{name}", default)
    ]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(given))
    assert load_config(file, words) == load_config(file) == TrainConfig(**given)


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {key.name}  [" in said for key in keys_of(TrainConfig))

"""The commands that README and docs show: their options exist, and our recipes take what is given beside them."""

import re
import shlex
from importlib import import_module

import pytest

from deepalign import cli
from deepalign.train.config import TrainConfig, load_config
from tests.test_docs import PAGES, ROOT

OURS = re.compile(r"(\w+=\S+ )*(deepalign [a-z-]+ |deepspeed .*deepalign|python -m deepalign)")
FIELDS = {f"--{name}" for name in TrainConfig.__dataclass_fields__}


def shown_commands() -> list[str]:
    """Every command of ours in the pages' blocks for a shell, on one line."""
    lines: set[str] = set()
    for page in PAGES:
        for block in re.findall(r"```(?:bash|text)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines |= {line.split(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines()}
    return sorted(line for line in lines if OURS.match(line))


def entry_point(words: list[str]) -> tuple[object, list[str], list[str]]:
    """What starts, the words that name a command of it, and the words after them."""
    if "deepalign" in words:
        words = words[words.index("deepalign") + 1 :]
        number = 2 if words[0] == "evaluate" else 1
        return cli, words[:number], words[number:]
    place = next(i for i, word in enumerate(words) if word.startswith(("deepalign.", "deepalign/")))
    name = words[place].removesuffix(".py").replace("/", ".")
    return import_module(name), [], words[place + 1 :]


@pytest.mark.parametrize("line", shown_commands())
def test_a_shown_command_has_its_options(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, command, words = entry_point(shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        module.main([*command, "--help"])
    assert ended.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    trains = command in ([], ["cache-teacher"], ["sweep"]) and "--config" in words
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    if trains:
        options = {option.partition(".")[0] for option in options}
        known |= FIELDS | {"--variant"}
    assert options <= known, f"no such option: {options - known}"


WRITING = [("demo",), ("diagnose",), ("sample",), ("sweep",), ("merge",)]
WRITING += [("evaluate", kind) for kind in ("prefill", "reasoning", "utility", "suite")]


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
def test_one_thing_has_one_name_in_every_command(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert "--out" in known
    assert ("--alpha" in known) == ("--space" in known), "contrastive decoding"


RECIPES = [line for line in shown_commands() if "--config configs/" in line and " sweep " not in line]


@pytest.mark.parametrize("line", RECIPES)
def test_a_recipe_takes_what_is_given_beside_it(line: str) -> None:
    _, command, words = entry_point(shlex.split(line))
    place = words.index("--config")
    previews = "--dry_run" in words  # its own options follow
    config = load_config(ROOT / words[place + 1], [] if previews else words[place + 2 :])
    if command == ["cache-teacher"]:
        assert config.teacher_cache is not None

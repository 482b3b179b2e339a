"""Writes what docs/ takes from docstrings, api.md and training-keys.md: `python docs/make_api.py`, or `make docs`.

What is public is what a module of `MODULES` lists in `__all__`. Docstrings are in Google's style; their sections become
lists.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from deepalign.train.config import TrainConfig
from deepalign.train.config_keys import keys_as_markdown

FOLDER = Path(__file__).parent
MODULES = {
    "The loss, the statistics, the sampler's draw": "deepalign",
    "Sampling": "deepalign.sampling",
    "Data": "deepalign.data",
    "Diagnosis": "deepalign.diagnose",
    "Evaluation": "deepalign.evaluate",
    "Defences": "deepalign.defenses",
}
SECTIONS = ("Args", "Returns", "Raises", "Yields", "Attributes")
HEAD = """\
# API reference

Written from the docstrings by `make docs`; a test checks that it is current. Sizes: N rows (tokens), V vocabulary,
H hidden, K selected. Equations are those of [the loss](loss.md).
"""


KEYS_HEAD = """\
# The keys of a training configuration

Of the YAML file that [`run.py`](training.md) takes, and of its command line (`--learning_rate 1e-5 --loss.top_k 50`).
Keys with a dot are nested: `loss: {top_k: 50}`. `variants`, named blocks of changes of which `variant` chooses one, are
on the page of [recipes](training-launch.md). Written by `make docs`; `run.py --help` says the same.
"""


def keys_page() -> str:
    """The table of a training configuration's keys."""
    return f"{KEYS_HEAD}\n{keys_as_markdown(TrainConfig)}\n"


def api_page() -> str:
    """The whole reference, as Markdown."""
    parts = [HEAD]
    for title, name in MODULES.items():
        module = import_module(name)
        parts += [f"## {title}", f"`{name}`: {summary(module)}"]
        parts += [text for public in public_names(module) for text in entry(name, public, getattr(module, public))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def public_names(module: ModuleType) -> list[str]:
    return [name for name in module.__all__ if not name.startswith("_")]


def summary(module: ModuleType) -> str:
    return " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())


def entry(module: str, name: str, thing: Any) -> Iterator[str]:
    """Heading, signature and docstring of one public name; a class with its public methods."""
    yield f"### {name}"
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        yield f"`{annotation(thing)}`"
        return
    yield signature(name, thing)
    if not (doc := inspect.getdoc(thing)):
        raise ValueError(f"{module}.{name} is public and has no docstring")
    yield markdown(doc)
    if inspect.isclass(thing) and not is_record(thing):
        for method, function in vars(thing).items():
            if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                yield signature(f"{name}.{method}", function)
                yield markdown(inspect.getdoc(function) or "")


def is_record(thing: type) -> bool:
    return dataclasses.is_dataclass(thing) or issubclass(thing, tuple)


def signature(name: str, thing: Any) -> str:
    """The call, one parameter a line where it is long."""
    made = inspect.signature(thing)
    parameters = [text for text in parameters_of(made) if text != "self"]
    returns = "" if inspect.isclass(thing) else f" -> {annotation(made.return_annotation)}"
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returns}"
    return f"```text\n{line}\n```"


def parameters_of(made: inspect.Signature) -> Iterator[str]:
    keyword_only = False
    for parameter in made.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "*"
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        keyword_only = keyword_only or stars == "*"
        text = stars + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {default(parameter.default)}"
        yield text


def annotation(of: Any) -> str:
    """A type as one reads it: without the modules its name is in."""
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", inspect.formatannotation(of).replace("NoneType", "None"))


def default(value: Any) -> str:
    if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return "..."
    return repr(value) if len(repr(value)) < 60 and " at 0x" not in repr(value) else "..."


def markdown(doc: str) -> str:
    """A docstring as Markdown: its sections become lists."""
    lines, section = [], ""
    for line in doc.splitlines():
        if (heading := line.rstrip(":")) in SECTIONS and line.endswith(":"):
            section = heading
            lines += ["", f"**{section}**", ""]
        elif not section or (line and not line.startswith(" ")):
            section = ""
            lines.append(line)
        elif item := re.match(r" {4}(?! )([\w*, .\[\]|]+): (.*)", line):
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif line.strip():
            lines.append(f"  {line.strip()}" if lines[-1].startswith(("- ", "  ")) else line.strip())
        else:
            lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


PAGES = {"api.md": api_page, "training-keys.md": keys_page}


def main() -> int:
    """Write the pages; with --check only say whether they are current."""
    current = True
    for name, make in PAGES.items():
        path, text = FOLDER / name, make()
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            current = False
            print(f"{name} is not current: run `make docs`")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())

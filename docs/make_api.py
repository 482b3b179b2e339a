"""Writes docs/api.md, the API reference, from the package's docstrings: `python docs/make_api.py`, or `make docs`.

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

PAGE = Path(__file__).with_name("api.md")
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


def page() -> str:
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


def main() -> int:
    """Write the page; with --check only say whether it is current."""
    text = page()
    if "--check" in sys.argv[1:]:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE.name} is {'current' if current else 'not current: run `make docs`'}")
        return 0 if current else 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

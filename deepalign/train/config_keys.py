"""The keys of a configuration, for `run.py --help` and for docs/training-keys.md.

Names, types and defaults come from the dataclass, what a key says from the `Attributes` of its docstring.
"""

import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

REQUIRED = "required"


class Key(NamedTuple):
    """One key: its name (dotted where nested), the values it takes, its default, what it says."""

    name: str
    values: str
    default: str
    meaning: str


def keys_of(config: type[Any], prefix: str = "") -> Iterator[Key]:
    """The keys of a configuration's dataclass in order, those of a nested one after the key that holds it.

    Raises:
        ValueError: a key that the docstring does not explain.
    """
    meanings = attributes_of(config)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name not in meanings:
            raise ValueError(f"the docstring of {config.__name__} does not explain {field.name}")
        nested = next((hint for hint in options_of(hints[field.name]) if dataclasses.is_dataclass(hint)), None)
        yield Key(prefix + field.name, values_of(hints[field.name]), default_of(field), meanings[field.name])
        if nested is not None:
            yield from keys_of(typing.cast(type[Any], nested), f"{prefix}{field.name}.")


def attributes_of(config: type[Any]) -> dict[str, str]:
    """What the `Attributes` of a docstring in Google's style say, by name."""
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", inspect.getdoc(config) or "", re.MULTILINE)
    entries = re.findall(r"^(\w+): (.*(?:\n +.*)*)", textwrap.dedent(section[1]) if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types that a union joins, or the one type there is."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def values_of(hint: Any) -> str:
    """A type as one writes its values in YAML."""
    names = {type(None): "null", str: "text", int: "integer", float: "number", bool: "true or false"}
    words = []
    for option in options_of(hint):
        origin = typing.get_origin(option)
        if origin is Literal:
            words += [str(value) for value in typing.get_args(option)]
        else:
            mapping = origin is dict or dataclasses.is_dataclass(option)
            words.append("list" if origin is tuple else "keys" if mapping else names[option])
    return ", ".join(words)


def default_of(field: "dataclasses.Field[Any]") -> str:
    """A default as YAML has it."""
    if field.default is not dataclasses.MISSING:
        return json.dumps(field.default).strip('"')
    if field.default_factory is dataclasses.MISSING:
        return REQUIRED
    return "{}" if field.default_factory is dict else ""


def keys_as_text(config: type[Any], width: int = 100) -> str:
    """All keys for a terminal."""
    lines = []
    for key in keys_of(config):
        default = key.default if key.default in ("", REQUIRED) else f"default {key.default}"
        lines.append(f"  {key.name}  [{'; '.join(filter(None, (key.values, default)))}]")
        lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def keys_as_markdown(config: type[Any]) -> str:
    """All keys as a table of a page in docs/."""
    rows = ["| key | values | default | |", "|---|---|---|---|"]
    for key in keys_of(config):
        default = key.default if key.default in ("", REQUIRED) else f"`{key.default}`"
        meaning = re.sub(r"docs/([\w-]+)\.md", r"[\1](\1.md)", key.meaning)
        rows.append(f"| `{key.name}` | {key.values} | {default} | {meaning} |".replace("|  |", "| |"))
    return "\n".join(rows)

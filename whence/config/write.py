"""Settings as YAML with a comment on each, and their JSON Schema for editors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from whence.config.schema import Config, adapter
from whence.settings import Section, Setting, in_file
from whence.shortage import shortages

SCHEMA = ".whence/schema.json"
"""Where `whence init` puts the schema, beside the YAML file."""

HEAD = f"# yaml-language-server: $schema={SCHEMA}\n"
COLUMN = 44
"""Where comments begin."""


def save_schema(folder: Path) -> None:
    """Write the schema where the first line of a `whence.yaml` in this folder says that it is."""
    path = folder / SCHEMA
    with shortages(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")


def json_schema(section: type[Section] = Config) -> dict[str, Any]:
    """The JSON Schema of a `whence.yaml`, or of a file of `Stages`."""
    schema = adapter(section).json_schema()
    _say_defaults(schema, schema["$defs"], section)
    title = "whence.yaml" if section is Config else "stages.yaml"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}


def _say_defaults(described: dict[str, Any], sections: dict[str, Any], section: type[Section]) -> None:
    """Put in the defaults that pydantic leaves out, or tells with settings that a file can't have."""
    for name, field in in_file(section).items():
        if isinstance(field.default, Section | dict):
            described["properties"][name]["default"] = field.default.as_json() if isinstance(field.default, Section) else {}
        if field.sections:  # in a file it is a list, see `whence.config.read`
            schema = described["properties"][name]
            (items,) = schema.pop("patternProperties").values()
            schema |= {"type": "array", "items": items} | ({"default": []} if field.default == {} else {})
            each = sections[field.sections.__name__]
            each["properties"] = {"name": {"type": "string", "description": "Its name."}} | each["properties"]
            each["required"] = ["name", *each.get("required", ())]
        if below := field.section or field.sections:
            _say_defaults(sections[below.__name__], sections, below)


def commented(values: Mapping[str, Any], introduction: str = "") -> str:
    """Write settings as self-explanatory YAML: those given as they are, all others commented out at their defaults."""
    text = "".join(f"# {line}".rstrip() + "\n" for line in introduction.splitlines())
    return HEAD + text + "\n" + "\n".join(_lines(Config, values, 0, live=True)) + "\n"


def _lines(section: type[Section], values: Mapping[str, Any], depth: int, *, live: bool) -> Iterator[str]:
    for name, field in in_file(section).items():
        below, given = field.section, name in values
        value = values[name] if given else _default(field)
        if below and (isinstance(value, Mapping) or (value is None and depth == 0 and not given)):
            shown = live and given
            if depth == 0:
                yield ""
                yield from (f"# {line}" for line in (below.__doc__ or "").splitlines() if line.strip())
            yield _line(f"{name}:", "" if depth == 0 else field.description, depth, shown)
            # A section without a setting would read as null: its first one is written.
            first = next(iter(in_file(below).values()))
            yield from _lines(below, value or {first.name: _default(first)}, depth + 1, live=shown)
        elif field.sections and value:
            yield from ("", _line(f"{name}:", field.description, depth, live))
            for key, entry in value.items():
                yield _line(f"- name: {key}", "", depth + 1, live)
                yield from _lines(field.sections, entry, depth + 2, live=live)
        else:
            yield _line(f"{name}: {_flow([] if field.sections else value)}", field.description, depth, live and given)


def _default(field: Setting) -> Any:
    if field.default is dataclasses.MISSING:
        return "..."
    return {} if isinstance(field.default, Section) else field.default


def _line(text: str, comment: str | None, depth: int, live: bool) -> str:
    indent = "  " * depth
    line = f"{indent}{text}" if live else f"# {indent}{text}"
    return f"{line:<{COLUMN}}  # {' '.join(comment.split())}" if comment else line


def _flow(value: Any) -> str:
    """A value on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return (
        yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
        .strip()
        .removesuffix("...")
        .strip()
    )

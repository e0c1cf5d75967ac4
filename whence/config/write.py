"""Settings as YAML with a comment on each, and their JSON Schema for editors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from whence.config.read import section_of
from whence.config.schema import Config, Section

SCHEMA = ".whence/schema.json"
"""Where `whence init` puts the schema, beside the YAML file."""

HEAD = f"# yaml-language-server: $schema={SCHEMA}\n"
COLUMN = 44
"""Where comments begin."""


def save_schema(folder: Path) -> None:
    """Write the schema where the first line of a `whence.yaml` in this folder says that it is."""
    path = folder / SCHEMA
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a `whence.yaml`."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **Config.model_json_schema(), "title": "whence.yaml"}


def commented(values: Mapping[str, Any], introduction: str = "") -> str:
    """Write settings as YAML that explains itself: those given as they are, all others commented out at their defaults."""
    text = "".join(f"# {line}".rstrip() + "\n" for line in introduction.splitlines())
    return HEAD + text + "\n" + "\n".join(_lines(Config, values, 0, live=True)) + "\n"


def _lines(section: type[Section], values: Mapping[str, Any], depth: int, *, live: bool) -> Iterator[str]:
    for name, field in section.model_fields.items():
        below, given = section_of(field.annotation), name in values
        value = values[name] if given else _default(field)
        if below and (isinstance(value, Mapping) or (value is None and depth == 0 and not given)):
            shown = live and given
            if depth == 0:
                yield ""
                yield from (f"# {line}" for line in (below.__doc__ or "").splitlines() if line.strip())
            yield _line(f"{name}:", "" if depth == 0 else field.description, depth, shown)
            # A section without a setting would read as null: its first one is said.
            first = next(iter(below.model_fields))
            said = value or {first: _default(below.model_fields[first])}
            yield from _lines(below, said, depth + 1, live=shown)
        else:
            yield _line(f"{name}: {_flow(value)}", field.description, depth, live and given)


def _default(field: Any) -> Any:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "..."
    return default.model_dump(exclude_defaults=True, mode="json") if isinstance(default, Section) else default


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

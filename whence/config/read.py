"""From a file, the environment and `--set` to one checked `Config`, and where each of its values came from.

Later ones win: defaults, the file, `WHENCE_SECTION__KEY` in the environment, `--set section.key=value`.
"""

from __future__ import annotations

import difflib
import functools
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from pydantic import ValidationError

from whence.config.plain_yaml import Unreadable, load_yaml, value_of
from whence.config.schema import Config, S, Stages, adapter
from whence.errors import UsageError
from whence.escapes import command
from whence.settings import Section, alternatives, in_file

ENVIRONMENT = "WHENCE_"
SHOWN = 5
"""Maximum mistakes listed at a time."""


@dataclass(frozen=True)
class Checked(Generic[S]):
    """Checked settings, the folder that their relative paths start from, and where the values came from."""

    config: S
    folder: Path
    origins: dict[str, str]
    """By dotted name: a file, a variable of the environment, or --set; what is missing is a default."""

    def place(self, name: str) -> str:
        """A path of the file that exists (or files, with * in their names), seen from here; a name of the hub as it is."""
        path = self.folder / Path(name).expanduser()
        return str(path) if path.exists() or (glob.has_magic(name) and glob.glob(str(path), recursive=True)) else name


class Resolved(Checked[Config]):
    """The settings of a run."""

    @property
    def chat_template(self) -> str | None:
        """The chat template; where it is a file, its path seen from here."""
        template = self.config.data.chat_template
        return self.place(template) if template and template in self.config.template_files else template

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.folder / Path(self.config.out or f"runs/{self.config.run}").expanduser()


def read_config(path: str | Path, settings: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Resolved:
    """Read a YAML file with the settings that were given over it, such as "score.damping=0.2".

    A run's own file, in the folder of the run, means that folder, wherever it was moved or copied to.

    Raises UsageError for a file that can't be read, an unknown key (with the nearest one) and an invalid value.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "whence.yaml"
    values = _values(path, "sections such as model, data and prompts", "whence init writes one")
    if {"models", "dataset"} <= values.keys():
        raise UsageError(
            f"{path} is a configuration of another pipeline (models, dataset, factors, scores).",
            fix=command("whence", "init", "--from", path, "whence.yaml"),
        )
    if (path.parent / "whence.lock").is_file() and Path(str(values.get("out"))).is_absolute():
        values["out"] = "."
    return resolve(values, path.parent, str(path), settings, os.environ if environment is None else environment)


def read_stages(path: str | Path) -> Checked[Stages]:
    """Read the YAML file of several trainings in a row, see `read_config`."""
    path = Path(path)
    values = _values(path, "`stages`: a list of trainings, in order", "whence config schema --stages shows what is available")
    values = by_name(values, Stages, str(path))
    origins: dict[str, str] = {}
    _lay({}, values, origins, str(path))
    try:
        return Checked(checked(values, Stages), path.parent, origins)
    except ValidationError as error:
        raise _refusal(error, origins, str(path), Stages) from None


def _values(path: Path, accepted: str, fix: str) -> dict[Any, Any]:
    """What a YAML file holds; raises UsageError where it can't be read, or holds no settings."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = [str(file) for file in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        raise UsageError(f"There is no file {path}.", fix=f"did you mean {', '.join(near[:3])}?" if near else fix) from None
    except (Unreadable, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML.", given=str(error), accepted=accepted, fix=fix) from None
    except OSError as error:
        raise UsageError(f"{path} can't be read.", given=str(error), accepted="a file") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings.", accepted=accepted, fix=fix)
    return values


def by_name(values: Mapping[str, Any], section: type[Section], origin: str) -> dict[str, Any]:
    """Lists of sections that have a name as mappings, so that a setting in one is known by its dotted name."""
    found = dict(values)
    for field in in_file(section).values():
        if field.sections is None or values.get(field.name) is None:
            continue
        entries: list[Any] = values[field.name] if isinstance(values[field.name], list) else [None]
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise UsageError(
                f"`{field.name}` in {origin} must be an ordered list whose entries have distinct names.",
                given=repr(values[field.name]),
                accepted="[{name: pretraining, ...}, {name: finetuning, ...}]",
            )
        found[field.name] = {entry["name"]: {key: entry[key] for key in entry if key != "name"} for entry in entries}
    return found


def checked(values: Mapping[str, Any], section: type[S] = Config) -> S:
    """Check nested dictionaries; raises pydantic's ValidationError."""
    return adapter(section).validate_python(_without_empty(values, section))


def resolve(
    values: Mapping[str, Any],
    folder: Path,
    origin: str,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """Check settings that are given as nested dictionaries, with those of the environment and the command line over them."""
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    _lay(merged, by_name(values, Config, origin), origins, origin)
    for name, text in sorted((environment or {}).items()):
        key = name.removeprefix(ENVIRONMENT)
        if key != name and "__" in key:
            _lay(merged, _nested(key.lower().split("__"), value_of(text)), origins, name)
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            raise UsageError(f"--set {setting} sets nothing.", accepted="KEY=VALUE, such as --set score.damping=0.2")
        _lay(merged, _nested(key.strip().split("."), value_of(text)), origins, f"--set {key.strip()}")
    try:
        config = checked(merged)
    except ValidationError as error:
        raise _refusal(error, origins, origin) from None
    return Resolved(config, folder, origins)


def values_of(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings with their dotted names."""
    for name, field in in_file(type(section)).items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from values_of(value, f"{prefix}{name}.")
        elif field.sections and value:
            for key, entry in value.items():
                yield from values_of(entry, f"{prefix}{name}.{key}.")
        else:
            yield f"{prefix}{name}", value


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _lay(over: dict[str, Any], values: Mapping[str, Any], origins: dict[str, str], origin: str, prefix: str = "") -> None:
    """Lay settings over others, section by section."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            below = over[key] if isinstance(over.get(key), dict) else {}
            over[key] = below
            _lay(below, value, origins, origin, f"{name}.")
        else:
            over[key] = dict(value) if isinstance(value, Mapping) else value
            origins[name] = origin


def _without_empty(values: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    """Leave out sections without a setting ("fit:"), which YAML reads as null, where null means nothing else."""
    kept = {}
    for key, value in values.items():
        field = in_file(section).get(str(key))
        below = field.section if field else None
        if field and field.sections:
            if not value:
                continue
            value = {name: _without_empty(entry, field.sections) for name, entry in value.items()}
        if value is None and field and below and type(None) not in alternatives(field.kind):
            continue
        kept[key] = _without_empty(value, below) if below and isinstance(value, Mapping) else value
    return kept


def _refusal(error: ValidationError, origins: Mapping[str, str], origin: str, section: type[Section] = Config) -> UsageError:
    """All mistakes in one message: where, what, and the nearest name."""
    mistakes: dict[str, list[Any]] = {}
    for entry in error.errors(include_url=False):
        mistakes.setdefault(_name(entry["loc"], section), []).append(entry)
    lines = [_mistake(name, entries, origins, origin, section) for name, entries in mistakes.items()]
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more"]
    count = "A setting is" if len(mistakes) == 1 else f"{len(mistakes)} settings are"
    given = ("\n" + " " * 11).join(lines)
    schema = "whence config schema" + " --stages" * (section is Stages)
    return UsageError(f"{count} wrong in {origin}.", given=given, fix=f"{schema} shows what is available")


def _name(location: Sequence[str | int], section: type[Section]) -> str:
    """The dotted name of a setting, without the names that pydantic gives to alternatives."""
    parts: list[str] = []
    for part in map(str, location):
        field, last = in_file(section).get(part), in_file(section).get(parts[-1]) if parts else None
        if field is None and last and last.section is None:
            continue  # after a plain setting comes no name
        parts.append(part)
        section = _below(section, part)
    return ".".join(parts) or "the whole"


def _below(section: type[Section], name: str) -> type[Section]:
    """The section that a setting holds, once or by name, or the one that it is in."""
    field = in_file(section).get(name)
    return (field.section or field.sections if field else None) or section


def _mistake(name: str, entries: Sequence[Any], origins: Mapping[str, str], origin: str, section: type[Section]) -> str:
    where = origins.get(name, origin)
    said = f" ({where})" if where != origin else ""
    kinds = {entry["type"] for entry in entries}
    if kinds & {"extra_forbidden", "unexpected_keyword_argument"}:
        *above, last = name.split(".")
        known = list(in_file(functools.reduce(_below, above, section)))
        near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"available: {', '.join(known)}"
        return f"{name}{said}: there is no such setting; {hint}"
    if "missing" in kinds:
        return f"{name}: is missing"
    messages = " or ".join(
        dict.fromkeys(entry["msg"].removeprefix("Value error, ").removeprefix("Input ") for entry in entries)
    )
    given = "" if "value_error" in kinds else f", not {entries[0]['input']!r}"
    return f"{name}{said}: {messages}{given}"

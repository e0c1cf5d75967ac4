"""The options of a command, made from the settings that it takes.

A parameter that is a section (`settings: Fit`) stands for one option per field, with the field's type, bounds, default and
meaning. `Annotated[Fit, Only("method")]` and `Annotated[Fit, Without("until")]` choose fields; the rest are at their defaults.
A parameter of the command's own takes the place of fields of its name, which have its value if they can. A flag belongs to the
first that has it, and a field of two sections is one option.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from typing import Annotated, Any, Literal

import typer

from whence.errors import UsageError
from whence.settings import Section, Setting, accepted, alternatives, bounds, settings_of, settled

EMPTY = inspect.Parameter.empty


class Without:
    """The fields of a section that are no options."""

    def __init__(self, *names: str):
        self.names = names

    def takes(self, name: str) -> bool:
        return name not in self.names


class Only(Without):
    """The fields of a section that are options."""

    def takes(self, name: str) -> bool:
        return name in self.names


def from_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of the sections that it takes."""
    hints = typing.get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters
    sections = {name: section for name in parameters if (section := _section(hints[name]))}
    own = [name for name in parameters if name not in sections]
    fields = {name: _fields(hints[name]) for name in sections}
    taken = {flag for name in own for flag in _flags_of(hints[name])}
    options: dict[str, inspect.Parameter] = {}
    for name, parameter in parameters.items():
        if name in own:
            options[name] = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for field in fields.get(name, ()):
            if field.name not in options and field.name not in own:
                options[field.name] = _option(field, taken)

    def run(**given: Any) -> None:
        made = {
            name: section(**{field.name: _value(field, given[field.name], field.name in own) for field in fields[name]})
            for name, section in sections.items()
        }
        command(**{name: given[name] for name in own}, **made)

    first_required = sorted(options.values(), key=lambda option: option.default is not EMPTY)
    run.__signature__ = inspect.Signature(first_required)  # type: ignore[attr-defined]
    run.__annotations__, run.__name__, run.__doc__ = {}, command.__name__, command.__doc__
    return run


def _section(hint: Any) -> type[Section] | None:
    kind = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _fields(hint: Any) -> list[Setting]:
    """The fields that are options; a section within a section is none."""
    section, marks = _section(hint), getattr(hint, "__metadata__", ())
    chosen = next((mark for mark in marks if isinstance(mark, Without)), Without())
    return [field for field in settings_of(section) if field.section is None and chosen.takes(field.name)] if section else []


def _flags_of(hint: Any) -> list[str]:
    """The flags of an option of the command's own."""
    infos = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, typer.models.OptionInfo)]
    return [flag for info in infos for flag in (str(info.default), *(info.param_decls or ()))]


def _flags(field: Setting) -> tuple[str, ...]:
    return field.doc.flags or (f"--{field.name.replace('_', '-')}",)


def _kinds(field: Setting) -> list[Any]:
    return [kind for kind in alternatives(field.kind) if kind is not type(None)]


def _form(field: Setting) -> Literal["flag", "choice", "repeated", "plain", "word"]:
    """How the command line writes a setting; a `word` is text that `_value` reads."""
    kinds = _kinds(field)
    origins, parts = [typing.get_origin(kind) for kind in kinds], typing.get_args(kinds[0])
    if bool in kinds:
        return "flag"
    if all(origin is Literal for origin in origins):
        return "choice"
    if origins[0] is dict or (origins[0] is tuple and typing.get_origin(parts[0]) is Literal):
        return "repeated"
    return "plain" if len(kinds) == 1 and origins[0] is not tuple and field.doc.none is None else "word"


def _option(field: Setting, taken: set[str]) -> inspect.Parameter:
    """A field as typer wants it; its flags are taken from here on."""
    kinds, form, default = _kinds(field), _form(field), field.default
    meaning, stop = (field.doc.meaning[:-1], ".") if field.doc.meaning.endswith(".") else (field.doc.meaning, "")
    number, limits = typing.get_args(kinds[0])[0] if bounds(kinds[0]) else kinds[0], bounds(kinds[0])
    words = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is Literal]
    metavar = "X" if number is float else "N" if number is int and limits else None
    flags = _flags(field)
    kind: Any = str
    extra: dict[str, Any] = {}
    if form == "flag":
        kind, default = bool, default if isinstance(default, bool) else None
        if default is not False and "/" not in flags[0]:
            flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}", *flags[1:])
    elif form == "choice":
        kind = Literal[tuple(words)]  # type: ignore[valid-type]
    elif form == "repeated":
        kind, default, meaning = list[str], None, f"{meaning}; repeat for more"
    elif form == "plain":
        kind = number
        extra = {"min": limits.get("ge", limits.get("gt")), "max": limits.get("le")}
    else:
        default = ",".join(default) if isinstance(default, tuple) else default if default is None else str(default)
        metavar = "|".join(filter(None, [metavar, *words, field.doc.none])) if metavar else None
        if any(typing.get_origin(kind) is tuple for kind in kinds) and "commas" not in meaning:
            meaning = f"{meaning}, joined by commas"
    flags = [flag for flag in flags if flag not in taken]
    taken.update(flags)
    option = typer.Option(*flags, help=meaning + stop or None, metavar=field.doc.metavar or metavar, **extra)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=EMPTY if default is MISSING else default,
        annotation=Annotated[kind | None if default is None else kind, option],  # type: ignore[valid-type]
    )


def _value(field: Setting, given: Any, own: bool) -> Any:
    """What was given on the command line, as the setting keeps it; an option of the command's `own` need not fit."""
    if given is None or own:
        return field.default if given is None or (value := settled(given, field.kind)) is MISSING else value
    (flag, *_), kinds = [flag.partition("/")[0] for flag in _flags(field) if flag.startswith("--")], _kinds(field)
    read = given
    if _form(field) == "word":
        read = _read(given, kinds, field.doc.none)
    elif typing.get_origin(kinds[0]) is dict:
        read = pairs(given, flag, field.doc.metavar or "NAME=VALUE", yaml=typing.get_args(kinds[0])[1] is Any)
    value = settled(read, field.kind)
    if value is MISSING:
        said = given if isinstance(given, str) else " ".join(map(str, given)) if isinstance(given, list) else f"{given:g}"
        raise UsageError(f"{flag} can't be {said}.", accepted=accepted(kinds))
    return value


def _read(text: str, kinds: Sequence[Any], none: str | None) -> Any:
    """The number, word or list that a text means."""
    if text == none:
        return None
    for kind in kinds:
        number = typing.get_args(kind)[0] if bounds(kind) else kind
        if typing.get_origin(kind) is Literal and text == typing.get_args(kind)[0]:
            return text
        if number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
        if typing.get_origin(kind) is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def pairs(given: Sequence[str], flag: str, metavar: str, *, yaml: bool = False) -> dict[str, Any]:
    """Read NAME=VALUE options, the values as text or as in YAML."""
    for entry in given:
        if "=" not in entry:
            raise UsageError(f"{flag} {entry} has no value.", accepted=metavar, fix=f"{flag} {entry}=...")
    found = dict(entry.split("=", 1) for entry in given)
    if not yaml:
        return found
    from yaml import safe_load

    return {name: safe_load(value) for name, value in found.items()}

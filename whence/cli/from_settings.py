"""The options of a command, made from the settings that it takes.

A parameter that is a section (`settings: Fit`) stands for one option per field, with the field's type, bounds, default and
meaning. `Annotated[Fit, Only("method")]` and `Annotated[Fit, Without("until")]` choose fields; the rest are at their defaults.
A parameter of the command's own takes the place of fields of its name, which have its value if they can. A flag belongs to the
first that has it, and a field of two sections is one option.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING
from typing import Annotated, Any, Literal

import typer

from whence.errors import UsageError
from whence.settings import Section, Setting, alternatives, settings_of

EMPTY = inspect.Parameter.empty


class Without:
    """The fields of a section that are not options."""

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
    hints, parameters = typing.get_type_hints(command, include_extras=True), inspect.signature(command).parameters
    sections = {name: found for name in parameters if (found := _section(hints[name]))}
    own = {
        name: parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in parameters.items()
        if name not in sections
    }
    infos = [mark for name in own for mark in getattr(hints[name], "__metadata__", ()) if hasattr(mark, "param_decls")]
    taken = {flag for info in infos for flag in (str(info.default), *(info.param_decls or ()))}
    options: dict[str, inspect.Parameter] = {}
    for name in parameters:
        if name in own:
            options[name] = own[name]
            continue
        for field in sections[name][1]:
            if field.name not in options and field.name not in own:
                options[field.name] = _option(field, taken)

    def run(*, context: typer.Context, **given: Any) -> None:
        _said.set(frozenset(name for name in given if _is_said(context, name)))
        made = {
            name: section(**{field.name: _value(field, given[field.name], field.name in own) for field in fields})
            for name, (section, fields) in sections.items()
        }
        command(**{name: given[name] for name in own}, **made)

    required_first = sorted(options.values(), key=lambda option: option.default is not EMPTY)
    required_first.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
    run.__signature__ = inspect.Signature(required_first)  # type: ignore[attr-defined]
    run.__annotations__, run.__name__, run.__doc__ = {}, command.__name__, command.__doc__
    return run


def said() -> frozenset[str]:
    """The names of the options that the command was given; the others are at their defaults."""
    return _said.get()


_said: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("said", default=frozenset())


def as_settings(fix: str, own: Collection[str]) -> str:
    """What fixes something, with settings of a file (`--set`) instead of the options that a command does not have.

    `own` are those that it has.
    """
    from whence.config.schema import Config

    homes: dict[str, str] = {}
    for section in settings_of(Config):
        for field in settings_of(section.section) if section.section else ():
            homes.setdefault(_flags(field)[0], f"{section.name}.{field.name}")

    def there(option: re.Match[str]) -> str:
        flag, value = option.groups()
        known = flag in homes and flag not in own
        return f"--set {homes[flag]}={value or '...'}" if known else option[0]

    return re.sub(r"(?<![\w-])(--[a-z][a-z-]+)(?: (\d[\w.]*|last-\d+|all\b|'[^']+'))?", there, fix)


def _is_said(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _section(hint: Any) -> tuple[type[Section], list[Setting]] | None:
    """The section that a parameter is, with the fields that are options; one within it only has the words that stand for it."""
    marks = getattr(hint, "__metadata__", ())
    section = typing.get_args(hint)[0] if marks else hint
    if not (isinstance(section, type) and issubclass(section, Section)):
        return None
    chosen = next((mark for mark in marks if isinstance(mark, Without)), Without())
    return section, [field for field in settings_of(section) if _kinds(field) and chosen.takes(field.name)]


def _flags(field: Setting) -> tuple[str, ...]:
    return field.flags or (f"--{field.name.replace('_', '-')}",)


def _kinds(field: Setting) -> list[Any]:
    """The types that an option can have; of a section within a section, only the words that stand for one."""
    kinds = [kind for kind in alternatives(field.kind) if kind is not type(None)]
    return kinds if field.section is None else [kind for kind in kinds if typing.get_origin(kind) is Literal]


def _form(field: Setting) -> Literal["flag", "choice", "repeated", "plain", "word"]:
    """How the command line writes a setting; a `word` is text with a meaning of its own, such as a number or all."""
    kinds = _kinds(field)
    origins, parts = [typing.get_origin(kind) for kind in kinds], typing.get_args(kinds[0])
    if bool in kinds:
        return "flag"
    if all(origin is Literal for origin in origins):
        return "choice"
    if origins[0] is dict or (origins[0] is tuple and typing.get_origin(parts[0]) is Literal):
        return "repeated"
    return "plain" if len(kinds) == 1 and origins[0] is not tuple and field.none is None else "word"


def _option(field: Setting, taken: set[str]) -> inspect.Parameter:
    """A field as typer wants it; its flags are taken from here on."""
    kinds, form, default, flags = _kinds(field), _form(field), field.default, _flags(field)
    number, *bounds = typing.get_args(kinds[0]) if typing.get_origin(kinds[0]) is Annotated else (kinds[0],)
    words = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is Literal]
    metavar = "X" if number is float else "N" if number is int and bounds else None
    meaning, stop = (field.meaning[:-1], ".") if field.meaning.endswith(".") else (field.meaning, "")
    kind: Any = str
    limits: dict[str, Any] = {}
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
        limits = {"max" if hasattr(bound, "le") else "min": dataclasses.astuple(bound)[0] for bound in bounds}
    else:
        default = ",".join(default) if isinstance(default, tuple) else default if default is None else str(default)
        metavar = "|".join(filter(None, [metavar, *words, field.none])) if metavar else None
        if any(typing.get_origin(kind) is tuple for kind in kinds) and "commas" not in meaning:
            meaning = f"{meaning}, joined by commas"
    flags = [flag for flag in flags if flag not in taken]
    taken.update(flags)
    option = typer.Option(*flags, help=meaning + stop or None, metavar=field.metavar or metavar, **limits)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=EMPTY if default is MISSING else default,
        annotation=Annotated[kind | None if default is None else kind, option],  # type: ignore[valid-type]
    )


def _value(field: Setting, given: Any, own: bool) -> Any:
    """What was given on the command line, as the setting keeps it; an option of the command's own need not fit."""
    if given is None:
        return field.default
    if own:
        with contextlib.suppress(UsageError):
            return field.check(given, typed=True)
        return field.default
    flag = next(flag for flag in _flags(field) if flag.startswith("--")).partition("/")[0]
    parts = next((typing.get_args(kind) for kind in _kinds(field) if typing.get_origin(kind) in (dict, tuple)), ())
    value: Any = given
    if isinstance(given, list) and str in parts:
        value = pairs(given, flag, field.metavar or "NAME=VALUE", yaml=Any in parts)
    elif _form(field) == "word":
        words = [typing.get_args(kind)[0] for kind in _kinds(field) if typing.get_origin(kind) is Literal]
        if given == field.none:
            value = None
        elif parts and str not in _kinds(field) and value not in words:
            value = [part.strip() for part in value.split(",") if part.strip()]
    return field.check(value, flag, typed=True)


def pairs(given: Sequence[str], flag: str, metavar: str, *, yaml: bool = False) -> dict[str, Any]:
    """Read NAME=VALUE options, the values as text or as in YAML."""
    for entry in given:
        if "=" not in entry:
            raise UsageError(f"{flag} {entry} has no value.", accepted=metavar, fix=f"{flag} {entry}=...")
    found = dict(entry.split("=", 1) for entry in given)
    if not yaml:
        return found
    from whence.config.plain_yaml import value_of

    return {name: value_of(value) for name, value in found.items()}

"""Which modules of a stage are which of the stage before: by name, or by what the user says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from whence.errors import UsageError
from whence.stages.stage import Stage

if TYPE_CHECKING:
    import pandas

Status = Literal["shared", "new", "gone", "another shape"]

SHOWN = 12
"""Modules that a refusal lists."""


@dataclass(frozen=True)
class Module:
    """A tracked module of a stage beside that of the stage before; one of them is missing where it is new or gone."""

    stage: str
    name: str | None
    """Here."""
    before: str | None
    """What it is called in the stage before."""
    shape: tuple[int, int]
    parameters: int
    share: float
    """Of what training moved: in this stage, or of a module that is gone, in the stage before."""
    status: Status
    shape_before: tuple[int, int] | None = None


def match(stages: Sequence[Stage]) -> list[Module]:
    """The tracked modules of each stage but the first, beside those of the stage before.

    Raises UsageError, with the modules in it, where one has another shape there, where `renamed` names one that there is not,
    or where none is shared.
    """
    found: list[Module] = []
    for before, stage in zip(stages, stages[1:], strict=False):
        pairs = _pairs(before, stage)
        _refuse(before, stage, pairs)
        found += pairs
    return found


def through(stages: Sequence[Stage], modules: Sequence[Module]) -> dict[str, dict[str, str]]:
    """For each stage, by name: what modules of the last stage are called in it, of those that are shared all the way."""
    last = stages[-1]
    names = {last.name: {name: name for name in last.names}}
    for before, stage in zip(reversed(stages[:-1]), reversed(stages), strict=False):
        back = {each.name: each.before for each in modules if each.stage == stage.name and each.status == "shared"}
        names[before.name] = {name: there for name, here in names[stage.name].items() if (there := back.get(here))}
        if not names[before.name]:
            raise UsageError(
                f"No module is shared by all stages from {before.name} to {last.name}",
                given=f"modules of {last.name}: {', '.join(last.names[:5])}",
                fix=f'name their counterparts: Stage("{stage.name}", ..., renamed={{"here": "before"}})',
            )
    return {stage.name: names[stage.name] for stage in stages}


def table_of(modules: Sequence[Module]) -> pandas.DataFrame:
    """One row for each module: stage, module (here), before (its name there), shape "O x I", parameters, share, status."""
    import pandas

    columns = {
        "stage": [each.stage for each in modules],
        "module": [each.name for each in modules],
        "before": [each.before for each in modules],
        "shape": [_shape(each) for each in modules],
        "parameters": [each.parameters for each in modules],
        "share": [each.share for each in modules],
        "status": [each.status for each in modules],
    }
    return pandas.DataFrame(columns)


def summary_of(modules: Sequence[Module]) -> str:
    """In words, for one stage: "4 of 6 modules shared, 81.0% of the parameters; 2 new, 1 gone"."""
    shared = [each.share for each in modules if each.status == "shared"]
    counts = {status: sum(each.status == status for each in modules) for status in ("new", "gone")}
    rest = [f"{count} {status}" for status, count in counts.items() if count]
    known = f"{len(shared)} of {len(modules) - counts['gone']} modules shared, {sum(shared):.1%} of the parameters"
    return "; ".join([known, *([", ".join(rest)] if rest else [])])


def _pairs(before: Stage, stage: Stage) -> list[Module]:
    here, there = stage.point.cover(stage.names), before.point.cover(before.names)
    renamed, taken, found = _renamed(stage, tuple(here.sites)), set[str](), []
    for name, site in here.sites.items():
        other = renamed.get(name, name)
        known = there.sites.get(other) if other is not None else None
        share = site.parameters / max(1, here.parameters)
        if known is None:
            found.append(Module(stage.name, name, None, site.shape, site.parameters, share, "new"))
            continue
        status: Status = "shared" if known.shape == site.shape else "another shape"
        found.append(Module(stage.name, name, other, site.shape, site.parameters, share, status, known.shape))
        taken.add(known.name)
    for name, site in there.sites.items():
        if name not in taken:
            share = site.parameters / max(1, there.parameters)
            found.append(Module(stage.name, None, name, site.shape, site.parameters, share, "gone"))
    return found


def _renamed(stage: Stage, names: Sequence[str]) -> dict[str, str | None]:
    """What `stage.renamed` says of each of these modules that it speaks of; a name goes before a pattern."""
    patterns = {here: there for here, there in stage.renamed.items() if "*" in here}
    found = {here: there for here, there in stage.renamed.items() if here not in patterns}
    for here, there in patterns.items():
        start, _, end = here.partition("*")
        for name in names:
            inside = len(name) >= len(start) + len(end) and name.startswith(start) and name.endswith(end)
            if inside and name not in found:
                found[name] = None if there is None else there.replace("*", name[len(start) : len(name) - len(end)])
    return found


def _refuse(before: Stage, stage: Stage, modules: Sequence[Module]) -> None:
    here = {each.name for each in modules if each.name}
    there = {each.before for each in modules if each.before}
    said = {name: other for name, other in stage.renamed.items() if "*" not in name}
    unknown = [name for name in said if name not in here] + [name for name in said.values() if name and name not in there]
    if unknown:
        raise UsageError(
            f"renamed names no tracked module: {unknown[0]}",
            given=_listed(modules),
            accepted=f"modules of {stage.name}, each with its name in {before.name}",
            fix="choose among these names; a module that is not tracked needs curvature, too (modules='all')",
        )
    if wrong := [each for each in modules if each.status == "another shape"]:
        raise UsageError(
            f"{len(wrong)} of {len(here)} modules of {stage.name} have another shape in {before.name}",
            given=_listed(modules, first=wrong),
            accepted="modules of one shape; a new one in the place of an old one is said to be new",
            fix=f'Stage("{stage.name}", ..., renamed={{"{wrong[0].name}": None}})',
        )
    if not any(each.status == "shared" for each in modules):
        raise UsageError(
            f"{stage.name} and {before.name} have no tracked module in common",
            given=_listed(modules),
            accepted="modules of the same name and shape in both",
            fix=f'name their counterparts: Stage("{stage.name}", ..., renamed={{"here.*": "before.*"}})',
        )


def _listed(modules: Sequence[Module], first: Sequence[Module] = ()) -> str:
    """The modules as lines of a message, `first` ones first."""
    chosen = [*first, *(each for each in modules if each not in first)]
    rows: list[Mapping[str, str]] = [
        {
            "here": each.name or "-",
            "before": each.before or "-",
            "shape": _shape(each),
            "share": f"{each.share:.1%}",
            "": each.status,
        }
        for each in chosen[:SHOWN]
    ]
    columns = list(rows[0])
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    lines = ["  ".join(text.ljust(widths[column]) for column, text in zip(columns, columns, strict=True)).rstrip()]
    lines += ["  ".join(row[column].ljust(widths[column]) for column in columns).rstrip() for row in rows]
    lines += [f"and {len(chosen) - SHOWN} more"] * (len(chosen) > SHOWN)
    return ("\n" + " " * 11).join(lines)


def _shape(module: Module) -> str:
    shapes = dict.fromkeys([module.shape, module.shape_before or module.shape])
    return ", before ".join(" x ".join(map(str, shape)) for shape in shapes)

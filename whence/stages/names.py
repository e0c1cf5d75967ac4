"""Which modules of a stage are which of the stage before: by name, or by what the user says of them.

A module that training left as it was passes everything on, whether it is tracked there or not: only those that it moved need
curvature. Under PEFT's adapters a module is known by the name that it has without them. What training moved and the stage
before lacks, such as adapters or a new head, is found whether it is tracked or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn

from whence.coverage import Coverage, Site, cover
from whence.errors import CoverageError, UsageError
from whence.progress import note
from whence.stages.stage import Stage

if TYPE_CHECKING:
    import pandas

Status = Literal["shared", "frozen", "new", "gone", "untracked", "another shape"]
"""In both; in both with the same weights; only here; only before; in both, but tracked in one of them; alike only in name."""

ROUNDED = 1e-2
"""Relative difference of weights that are the same in another format."""

PASSES: tuple[Status, ...] = ("shared", "frozen")

WRAPPED = re.compile(r"^base_model\.model\.|\.base_layer$|\.modules_to_save\.[^.]+$")
"""What PEFT adds to the names of modules that it adapts or copies."""

SHOWN = 12
"""Modules that a refusal lists."""


@dataclass(frozen=True)
class Module:
    """A module of a stage beside that of the stage before; one of them is missing where it is new or gone."""

    stage: str
    name: str | None
    """Here."""
    before: str | None
    """What it is called in the stage before."""
    shape: tuple[int, int]
    parameters: int
    share: float
    """Of all parameters of the stage's model."""
    status: Status
    shape_before: tuple[int, int] | None = None


def match(stages: Sequence[Stage]) -> list[Module]:
    """The modules of each stage but the first beside those of the stage before, from which influence comes through it.

    Raises UsageError, with the modules in it, where one has another shape there, where `renamed` names one that there is not,
    or where none is shared.
    """
    found: list[Module] = []
    known = stages[0].point.cover(stages[0].names).sites
    for before, stage in zip(stages, stages[1:], strict=False):
        pairs, known = _pairs(before, stage, known)
        _refuse(before, stage, pairs)
        found += pairs
    return found


def through(stages: Sequence[Stage], modules: Sequence[Module]) -> dict[str, dict[str, str]]:
    """For each stage, by name: what modules of the last stage are called in it, of those that lead back to it."""
    last = stages[-1]
    here = [each.name for each in modules if each.stage == last.name and each.name and each.status != "untracked"]
    names = {last.name: {name: name for name in (*last.names, *here)}}
    for before, stage in zip(reversed(stages[:-1]), reversed(stages), strict=False):
        back = {each.name: each.before for each in modules if each.stage == stage.name and each.status in PASSES}
        names[before.name] = {name: there for name, own in names[stage.name].items() if (there := back.get(own))}
        if not names[before.name]:
            raise UsageError(
                f"No module leads from {last.name} back to {before.name}",
                given=f"modules of {last.name}: {', '.join(last.names[:5])}",
                fix=f'name their counterparts: Stage("{stage.name}", ..., renamed={{"here": "before"}})',
            )
    return {stage.name: names[stage.name] for stage in stages}


def frozen(stage: Stage, modules: Sequence[Module]) -> tuple[str, ...]:
    """The modules that a stage's training left as they were."""
    return tuple(each.name for each in modules if each.stage == stage.name and each.status == "frozen" and each.name)


def settled(stages: Sequence[Stage]) -> list[Stage]:
    """The stages, those whose modules nobody chose without what their training left as it was, and with what it began anew.

    So a trunk is known to be frozen that was saved without saying so: its weights are those of the stage before.
    """
    found = [*stages]
    for number, (before, stage) in enumerate(zip(stages, stages[1:], strict=False), 1):
        if stage.modules is not None or not isinstance(stage.curvature, str | None):
            continue
        tracked, there = stage.point.cover(stage.names).sites, dict(before.point.model.named_modules())
        said = {**_adapted(stage.point.model, there), **stage.renamed}
        called = {name: name for name in tracked} | _renamed(said, tracked)
        known = _carried(before.point.model, {}, [name for name in called.values() if name]).sites
        moved = [name for name, site in tracked.items() if not _same(site, known.get(called[name] or ""))]
        chosen = [*moved, *(name for name in _begun(before, stage, said) if name not in moved)]
        if chosen and len(moved) < len(tracked):
            note(f"{stage.name}: tracking {len(chosen)} modules that moved ({chosen[0]} the first), of {len(tracked)}")
            found[number] = replace(stage, modules=chosen)
    return found


def table_of(modules: Sequence[Module]) -> pandas.DataFrame:
    """One row for each module: stage, module (here), before (its name there), shape, parameters, share, status."""
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
    """In words, for one stage: "4 modules shared, 81.0% of the parameters; 2 new, 1 gone"."""
    counts = {status: [each for each in modules if each.status == status] for status in get_args(Status)}
    passing = [each.share for each in modules if each.status in PASSES]
    rest = [f"{len(some)} {status}" for status, some in counts.items() if some and status != "shared"]
    known = f"{len(passing)} modules shared, {sum(passing):.1%} of the parameters"
    return "; ".join([known, *([", ".join(rest)] if rest else [])])


def _pairs(before: Stage, stage: Stage, known: Mapping[str, Site]) -> tuple[list[Module], dict[str, Site]]:
    """The modules of a stage beside those `known` in the stage before, and what is known of it in turn."""
    said = {**_adapted(stage.point.model, known), **stage.renamed}
    tracked, carried = stage.point.cover(stage.names), _carried(stage.point.model, said, known)
    begun = _begun(before, stage, said)
    here, unmoved = {**carried.sites, **tracked.sites}, {*carried.frozen_sites, *tracked.frozen_sites}
    here |= begun if stage.head == "cross" else {}
    renamed, taken, found, strange = _renamed(said, here), set[str](), list[Module](), 0
    total = max(1, sum(parameter.numel() for parameter in stage.point.model.parameters()))
    for name, site in here.items():
        there = known.get(renamed.get(name, name) or "")
        about = (site.shape, site.parameters, site.parameters / total)
        if there is None or (there.shape != site.shape and name not in tracked.sites):
            if name in begun or name in tracked.sites:
                found.append(Module(stage.name, name, None, *about, "new" if name in begun else "untracked"))
            continue
        taken.add(there.name)
        status: Status = "shared" if name in tracked.sites else "untracked"
        if there.shape != site.shape:
            status = "another shape"
        elif name in unmoved or _same(site, there):
            status = "frozen"
            strange += not _same(site, there, ROUNDED)
        found.append(Module(stage.name, name, there.name, *about, status, there.shape))
    if strange:
        note(
            f"warning: {stage.name} kept {strange} of its modules as they were, with other weights than {before.name} "
            "ended with: is a training between them missing?"
        )
    gone = [site for name, site in known.items() if name not in taken]
    found += [
        Module(stage.name, None, each.name, each.shape, each.parameters, each.parameters / total, "gone") for each in gone
    ]
    leads_on = [each.name for each in found if each.name and (each.name in tracked.sites or each.status != "untracked")]
    return found, {name: here[name] for name in leads_on}


def _carried(model: nn.Module, renamed: Mapping[str, str | None], known: Iterable[str]) -> Coverage:
    """The model's modules that may be those `known` in the stage before, whether they are tracked or not."""
    try:
        return cover(model, _back(renamed, known))
    except CoverageError:  # it has none of them
        return Coverage({}, 0, {})


def _adapted(model: nn.Module, known: Iterable[str]) -> dict[str, str]:
    """Modules that are called otherwise in the stage before only because of adapters, here or there, and their names there."""
    plain = {WRAPPED.sub("", name): name for name in known}
    names = [name for name, _ in model.named_modules() if name not in plain.values()]
    return {name: there for name in names if (there := plain.get(WRAPPED.sub("", name)))}


def _begun(before: Stage, stage: Stage, renamed: Mapping[str, str | None]) -> dict[str, Site]:
    """What training moved that the stage before lacks: a new head, adapters."""
    there = {WRAPPED.sub("", name) for name, _ in before.point.model.named_modules()}
    sites = cover(stage.point.model, "trained").sites
    called = {name: name for name in sites} | _renamed(renamed, sites)
    return {name: site for name, site in sites.items() if WRAPPED.sub("", called[name] or "") not in there - {""}}


def _same(site: Site, other: Site | None, rounded: float = 0.0) -> bool:
    """Whether two sites have the same weights, but for that they may be rounded."""
    if other is None:
        return False
    (module, layer), (before, layer_before) = site.uses[0], other.uses[0]
    pairs = list(zip(layer.parameters(module), layer_before.parameters(before), strict=False))
    return (
        bool(pairs)
        and site.shape == other.shape
        and all(
            own.shape == there.shape and torch.allclose(own.detach(), there.detach().to(own), rtol=rounded, atol=0)
            for own, there in pairs
        )
    )


def _back(renamed: Mapping[str, str | None], known: Iterable[str]) -> list[str]:
    """What modules `known` in the stage before may be called in this one."""
    turned = {there: here for here, there in renamed.items() if there is not None}
    several = [(there, here) for here, there in renamed.items() if there is not None and "*" in there]
    return [name for each in known for name in (turned.get(each), *(_fitted(each, *pair) for pair in several), each) if name]


def _fitted(name: str, pattern: str, into: str) -> str | None:
    """`into` with what the `*` of the pattern stands for in the name; None where it does not fit."""
    start, star, end = pattern.partition("*")
    if not star:
        return into if name == pattern else None
    inside = len(name) >= len(start) + len(end) and name.startswith(start) and name.endswith(end)
    return into.replace("*", name[len(start) : len(name) - len(end)]) if inside else None


def _renamed(renamed: Mapping[str, str | None], names: Iterable[str]) -> dict[str, str | None]:
    """What is said of each of these modules that are spoken of; a name goes before a pattern, and the first pattern first."""
    found = {here: there for here, there in renamed.items() if "*" not in here}
    for here, there in renamed.items():
        for name in names if "*" in here else ():
            if name not in found and (fitted := _fitted(name, here, there or "")) is not None:
                found[name] = fitted or None
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
            accepted="modules of one shape; a new one in the place of an old one is marked as new",
            fix=f'Stage("{stage.name}", ..., renamed={{"{wrong[0].name}": None}})',
        )
    if not any(each.status in PASSES for each in modules):
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

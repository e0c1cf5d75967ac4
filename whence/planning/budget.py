"""Settings that keep to a budget of memory: smaller batches, more groups of modules, lower rank of the queries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from whence.engine.partition import batch_positions
from whence.errors import DoesNotFit
from whence.planning.plan import Plan, Settings, Stage
from whence.planning.planner import Planner
from whence.planning.show import duration, size

MARGIN = 1.1
"""A plan counts as fitting when so many times its memory does: predictions are off by some percent."""
STEPS = 8
FIT_STAGES = ("covariance", "eigenvectors", "eigenvalues")
LOWEST_RANK, SMALLEST_BLOCK = 16, 256


def fitting(planner: Planner, asked: Settings) -> Plan:
    """A plan within the memory and disk of `planner.free`; raises DoesNotFit with what would."""
    plan = squeezed(planner, asked)
    if not within(plan):
        raise _does_not_fit(planner, asked, plan)
    return plan


def within(plan: Plan) -> bool:
    """Whether it fits with a margin for what a prediction is worth."""
    return plan.memory * MARGIN <= plan.free["memory"] and plan.disk_peak <= plan.free["disk"]


def squeezed(planner: Planner, asked: Settings) -> Plan:
    """The plan for these settings, changed where they take the most memory until it fits or nothing is left to change."""
    settings, plan = asked, planner.evaluate(asked)
    for _ in range(STEPS):
        if within(plan) or (smaller := _smaller(planner, settings, plan)) is None:
            break
        settings, plan = smaller, planner.evaluate(smaller)
    return plan.with_changes(asked)


def _smaller(planner: Planner, settings: Settings, plan: Plan) -> Settings | None:
    """One step down at the stage that takes the most; None where nothing is left, or memory is not what lacks."""
    if plan.memory * MARGIN <= plan.free["memory"]:
        return None
    stage = max(plan.stages, key=lambda stage: stage.memory.peak)
    steps: list[Callable[[], Settings | None]] = [
        lambda: _fewer_tokens(planner, settings),
        lambda: _more_groups(planner, settings, plan) if stage.name in FIT_STAGES else _lower_rank(settings, plan),
    ]
    for step in steps if _mostly_batch(stage) else reversed(steps):
        if (found := step()) is not None:
            return found
    return None


def _mostly_batch(stage: Stage) -> bool:
    return stage.name != "eigenvectors" and stage.memory.comes > stage.memory.tensors // 2


def _fewer_tokens(planner: Planner, settings: Settings) -> Settings | None:
    now = batch_positions(settings.batch_tokens, torch.device(planner.device))
    longest = max(planner.data.examples.sizes)
    return settings.changed(batch_tokens=max(longest, now // 4)) if now > longest else None


def _more_groups(planner: Planner, settings: Settings, plan: Plan) -> Settings | None:
    groups = min(4 * settings.fit.groups, plan.model["families"])
    return settings.changed(groups=groups) if groups > settings.fit.groups else None


def _lower_rank(settings: Settings, plan: Plan) -> Settings | None:
    now = plan.data["rank"]
    if now is not None and now <= LOWEST_RANK:
        return None
    return settings.changed(rank=64 if now is None else LOWEST_RANK)


def _does_not_fit(planner: Planner, asked: Settings, smallest: Plan) -> DoesNotFit:
    """The error, with what would fit: each alternative with its memory and time, the least loss first."""
    alternatives = []
    ways = ("split wide factors", _splits(smallest)), ("track fewer layers", _fewer_layers(asked, smallest))
    room = smallest.free["memory"] > MARGIN * (smallest.resident + min(stage.memory.libraries for stage in smallest.stages))
    for what, candidates in ways if room else ():
        for settings in candidates:
            plan = planner.evaluate(settings)
            if within(plan):
                options = _options(asked.differences(plan.settings))
                alternatives.append(f"{what}: {options}  ({size(plan.memory)}, {duration(plan.seconds)})")
                break
    if room and asked.fit.method != "identity":
        plan = planner.evaluate(smallest.settings.changed(method="identity"))
        if within(plan):
            alternatives.append(f"no curvature: --method identity  ({size(plan.memory)}, {duration(plan.seconds)})")
    changed = _options(smallest.changes) or "these settings"
    needed = f"{size(smallest.memory * MARGIN)} of memory and {size(smallest.disk_peak)} of disk"
    alternatives.append(f"{needed}, with {changed}  ({duration(smallest.seconds)})")
    numbered = ("\n" + " " * 11).join(f"{number}. {text}" for number, text in enumerate(alternatives, 1))
    lacks = "disk" if smallest.memory * MARGIN <= smallest.free["memory"] else "memory"
    have, want = smallest.free[lacks], smallest.disk_peak if lacks == "disk" else smallest.memory
    return DoesNotFit(
        f"Nothing fits in {size(have)} of {lacks}",
        given=f"at least {size(want)} with the smallest batches, most groups and lowest rank; {size(smallest.resident)} of "
        f"memory are the model and the process",
        fix=numbered,
    )


def _options(values: dict[str, Any]) -> str:
    """As on the command line."""
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in values.items())


def _splits(plan: Plan) -> Iterator[Settings]:
    """Covariances in blocks of a quarter of the width, of a sixteenth."""
    for parts in (4, 16):
        if (width := plan.model["widest"] // parts) >= SMALLEST_BLOCK:
            yield plan.settings.changed(largest_factor=width)


def _fewer_layers(asked: Settings, plan: Plan) -> Iterator[Settings]:
    """The last half of the layers, the last quarter, the last layer."""
    modules = asked.fit.modules
    selector = modules if isinstance(modules, str) else ",".join(modules or ())
    kinds = re.sub(r",?last-\d+", "", selector).strip(",")
    for parts in (2, 4, plan.model["layers"]):
        if (layers := plan.model["layers"] // max(1, parts)) >= 1:
            yield plan.settings.changed(modules=f"{kinds},last-{layers}" if kinds else f"last-{layers}")

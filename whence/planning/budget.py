"""Settings that stay within a memory budget: smaller batches, more groups of modules, lower rank of the queries."""

from __future__ import annotations

import re
from typing import Protocol

from whence.errors import DoesNotFit
from whence.planning.plan import Plan, Settings, duration, has_room, options
from whence.progress import note
from whence.show.numbers import size

MARGIN = 1.1
"""A plan counts as fitting when this many times its memory fits: predictions are off by some percent."""
STEPS = 8
FIT_STAGES = ("covariance", "eigenvectors", "eigenvalues")
INDEX_STAGES = ("questions", "landmarks", "index")
LOWEST_RANK, SMALLEST_BLOCK = 16, 256


class Evaluate(Protocol):
    """The plan for settings; roughly, its memory is the same, and less is rehearsed for its seconds."""

    def __call__(self, settings: Settings, roughly: bool = False) -> Plan: ...


def fitting(evaluate: Evaluate, asked: Settings, longest: int, batch_tokens: int) -> Plan:
    """A plan within the memory and disk that are free; raises DoesNotFit with what would.

    `longest` are the positions of the longest example, `batch_tokens` those of a batch where the settings say nothing.
    """
    settings, plan = asked, evaluate(asked, roughly=True)
    for _ in range(STEPS):
        if within(plan) or (smaller := _smaller(settings, plan, longest, batch_tokens)) is None:
            break
        changes = options(asked.differences(smaller))
        note(f"{size(plan.memory)} of memory would be needed, {size(plan.free['memory'])} are there: trying {changes}")
        settings, plan = smaller, evaluate(smaller, roughly=True)
    plan = evaluate(settings).with_changes(asked)
    if not within(plan):
        raise _does_not_fit(evaluate, asked, plan)
    return plan


def within(plan: Plan) -> bool:
    """Whether it fits with a margin for what a prediction is worth."""
    return has_room(plan.free, round(plan.memory * MARGIN), plan.disk_peak)


def _smaller(settings: Settings, plan: Plan, longest: int, batch_tokens: int) -> Settings | None:
    """One step down at the stage that takes the most memory; None where nothing is left, or memory is not what is short."""
    if plan.memory * MARGIN <= plan.free["memory"]:
        return None
    stage = max(plan.stages, key=lambda stage: stage.memory.peak)
    now, rank = settings.batch_tokens or batch_tokens, plan.data["rank"]
    fewer_tokens = settings.changed(batch_tokens=max(longest, now // 4)) if now > longest else None
    if stage.name in INDEX_STAGES:
        return fewer_tokens
    groups = min(4 * settings.fit.groups, plan.model["families"])
    if stage.name not in FIT_STAGES:
        less = settings.changed(rank=64 if rank is None else LOWEST_RANK) if rank is None or rank > LOWEST_RANK else None
    else:
        less = settings.changed(groups=groups) if groups > settings.fit.groups else None
    mostly_batch = stage.name != "eigenvectors" and stage.memory.comes > stage.memory.tensors // 2
    return (fewer_tokens or less) if mostly_batch else (less or fewer_tokens)


def _does_not_fit(evaluate: Evaluate, asked: Settings, smallest: Plan) -> DoesNotFit:
    """The error, with what would fit: each alternative with its memory and time, the least loss first."""
    model, settings, selector = smallest.model, smallest.settings, asked.fit.modules
    widths = [width for parts in (4, 16) if (width := model["widest"] // parts) >= SMALLEST_BLOCK]
    layers = [count for parts in (2, 4, max(1, model["layers"])) if (count := model["layers"] // parts)]
    kinds = re.sub(r",?last-\d+", "", selector if isinstance(selector, str) else ",".join(selector or ())).strip(",")
    ways = {
        "split wide factors": [settings.changed(largest_factor=width) for width in widths],
        "track fewer layers": [settings.changed(modules=f"{kinds},last-{count}".strip(",")) for count in layers],
        "no curvature": [settings.changed(method="identity")] if asked.fit.method != "identity" else [],
    }
    alternatives = []
    room = smallest.free["memory"] > MARGIN * (smallest.resident + min(stage.memory.libraries for stage in smallest.stages))
    for way, candidates in ways.items() if room else ():
        rough = (evaluate(candidate, roughly=True) for candidate in candidates)
        if fits := next((plan for plan in rough if within(plan)), None):
            plan = evaluate(fits.settings)
            changes = {"method": "identity"} if way == "no curvature" else asked.differences(plan.settings)
            alternatives.append(f"{way}: {options(changes)}  ({size(plan.memory)}, {duration(plan.seconds)})")
    changed = options(smallest.changes) or "these settings"
    needed = f"{size(smallest.memory * MARGIN)} of memory and {size(smallest.disk_peak)} of disk"
    alternatives.append(f"{needed}, with {changed}  ({duration(smallest.seconds)})")
    lacks = "disk" if smallest.memory * MARGIN <= smallest.free["memory"] else "memory"
    have, want = smallest.free[lacks], smallest.disk_peak if lacks == "disk" else smallest.memory
    return DoesNotFit(
        f"Nothing fits in {size(have)} of {lacks}",
        given=f"at least {size(want)} with the smallest batches, most groups and lowest rank; {size(smallest.resident)} of "
        f"memory are the model and the process",
        fix=("\n" + " " * 11).join(f"{number}. {text}" for number, text in enumerate(alternatives, 1)),
    )

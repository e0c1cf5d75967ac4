"""Run the stages that have to: the rest is skipped, what was begun resumes, and what is out of date is moved aside."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from whence import dist
from whence.config import Resolved, commented, runs_of
from whence.config.read import values_of
from whence.errors import UsageError
from whence.pipeline.lock import Lock, Record, changes
from whence.pipeline.needs import check_inputs, check_method, check_packages
from whence.pipeline.stages import STAGES, Stage, active
from whence.progress import note
from whence.store.files import aside, atomic, locked
from whence.store.intact import refuse_loop
from whence.train.reading import as_trained

SHOWN = 5
"""Changes that are listed at a time."""

SETTINGS = "whence.yaml"
"""The run's own copy of its settings."""

State = Literal["unchanged", "new", "resumed", "stale"]


@dataclass(frozen=True)
class Step:
    """What becomes of a stage in this run, and why."""

    stage: Stage
    state: State
    made_from: dict[str, Any]
    reasons: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Hash of what the stage is made from."""
        return Record(self.made_from).identity


def _as_trained(resolved: Resolved) -> Resolved:
    """The rows of models that the run does not train, with what its file does not say as in the training of the model."""
    config, found = resolved.config, {}
    for name, run in runs_of(config).items():
        section = "data." if name not in list(config.stages)[:-1] else f"stages.{name}.data."
        said = {key.removeprefix(section) for key in resolved.origins if key.startswith(section)}
        models = [resolved.place(key) for key in (run.model.adapter, run.model.path or run.model.base) if key]
        found[name] = run.data if run.train is not None else as_trained(run.data, said, *models)
    *earlier, last = found
    stages = config.stages | {name: config.stages[name].changed(data=found[name]) for name in earlier}
    return replace(resolved, config=config.changed(data=found[last], stages=stages))


def plan_run(resolved: Resolved, wanted: Sequence[str] = ()) -> list[Step]:
    """Decide for every stage (or for those `wanted` and what they need) whether it has to run.

    Raises UsageError for an unknown stage.
    """
    return _plan(_as_trained(resolved), Lock.read(resolved.out), wanted)


def run_pipeline(resolved: Resolved, wanted: Sequence[str] = ()) -> list[Step]:
    """Run all stages that have to, in their order; those `wanted` only with what they need.

    A stage that was killed resumes where it stopped. One made from something else is run again; what it made before
    is kept as NAME.1. Raises WhenceError where another process runs stages in the same folder.
    """
    refuse_loop(resolved.out)
    resolved = _as_trained(resolved)
    lock = Lock.read(resolved.out)
    steps = _plan(resolved, lock, wanted)
    if all(step.state == "unchanged" for step in steps):
        dist.on_first(say_unchanged, resolved, steps)
        return steps
    check_method(resolved.config)
    check_packages(resolved.config, [step.stage for step in steps if step.state != "unchanged"])
    with contextlib.ExitStack() as held:
        dist.on_first(lambda: held.enter_context(locked(resolved.out)))
        found = Lock.read(resolved.out)
        if dist.from_first(found.records != lock.records):  # by another run that held it until now
            found.hashes |= lock.hashes
            lock, steps = found, _plan(resolved, found, wanted)
        _run(resolved, steps, lock)
    return steps


def _run(resolved: Resolved, steps: Sequence[Step], lock: Lock) -> None:
    """Run the stages that have to."""
    from whence.pipeline.work import Workshop  # torch and all: only when there is something to do

    dist.on_first(_keep_settings, resolved, lock)
    workshop = Workshop.of(resolved)
    check_inputs(workshop, [step.stage for step in steps if step.state in ("new", "stale")])
    for number, step in enumerate(steps, 1):
        _say(number, len(steps), step)
        if step.state == "unchanged":
            continue
        started = time.monotonic()
        dist.on_first(_begin, step, lock)
        if step.stage.ranks:
            step.stage.work(workshop, resolved.out)
        else:
            dist.on_first(_alone, step.stage, resolved.out, workshop)
        dist.on_first(_end, step, lock, time.monotonic() - started)


def say_unchanged(resolved: Resolved, steps: Sequence[Step]) -> None:
    """Note that each stage is skipped; the run's copy of its settings is written again where it is damaged."""
    resolved = _as_trained(resolved)
    for number, step in enumerate(steps, 1):
        _say(number, len(steps), step)
    lock = Lock.read(resolved.out)
    if not lock.lists(SETTINGS):
        _keep_settings(resolved, lock)


def _plan(resolved: Resolved, lock: Lock, wanted: Sequence[str]) -> list[Step]:
    """What becomes of each stage; of several processes the first decides: others may not yet see what it finds on disk."""
    stages = _needed(active(resolved.config), wanted)

    def decide() -> list[tuple[State, dict[str, Any], tuple[str, ...]]]:
        return [(step.state, step.made_from, step.reasons) for step in _steps(resolved, lock, stages)]

    return [Step(stage, *found) for stage, found in zip(stages, dist.on_first(decide), strict=True)]


def _steps(resolved: Resolved, lock: Lock, stages: Sequence[Stage]) -> list[Step]:
    steps: dict[str, Step] = {}
    for stage in stages:
        after = {name: steps[name].identity for name in stage.after if name in steps}
        made_from = {
            "settings": stage.settings(resolved.config),
            "inputs": lock.hashes_of([resolved.place(name) for name in stage.inputs(resolved.config)]),
            "after": after,
            "code": stage.code(),
        }
        step = _step(stage, made_from, lock)
        if step.state == "unchanged" and (again := [name for name in after if steps[name].state != "unchanged"]):
            # made from the same, and yet from files that are lost: what replaces them may differ in its last bits
            step = replace(step, state="stale", reasons=tuple(f"{name} runs again" for name in again))
        steps[stage.name] = step
    return list(steps.values())


def _step(stage: Stage, made_from: dict[str, Any], lock: Lock) -> Step:
    record = lock.records.get(stage.name)
    if record is None:
        return Step(stage, "new", made_from)
    if differing := changes(record.made_from, made_from):
        after = [line for line in differing if line.startswith("after.")]
        again = [f"{name} runs again" for name in stage.after if any(f"after.{name} " in line for line in after)]
        return Step(stage, "stale", made_from, (*(line for line in differing if line not in after), *again))
    if record.files is None:
        return Step(stage, "resumed", made_from)
    if faults := record.faults(lock.folder):
        return Step(stage, "stale", made_from, tuple(faults))
    if record.digests is None:
        return Step(
            stage,
            "unchanged",
            made_from,
            ("its files have no digests (an older version made them): only their sizes are compared",),
        )
    return Step(stage, "unchanged", made_from)


def _needed(stages: Sequence[Stage], wanted: Sequence[str]) -> list[Stage]:
    """The stages that were asked for, and those that they need, in their order."""
    names = {stage.name: stage for stage in stages}
    if unknown := [name for name in wanted if name not in names]:
        there = ", ".join(names)
        off = [name for name in unknown if name in {stage.name for stage in STAGES}]
        fix = f"{off[0]} is switched off in the file" if off else ""
        raise UsageError(f"There is no stage {unknown[0]!r} in this run.", accepted=there, fix=fix)
    kept, look = set[str](), list(wanted or names)
    while look:
        name = look.pop()
        if name not in kept:
            kept.add(name)
            look += [
                other for other in names[name].after if other in names and (not wanted or other not in names[name].optional)
            ]
    return [stage for stage in stages if stage.name in kept]


def _begin(step: Step, lock: Lock) -> None:
    if step.state == "stale":
        _set_aside(lock.folder, step.stage.folders)
    lock.records[step.stage.name] = Record(step.made_from)
    lock.write()


def _alone(stage: Stage, out: Path, workshop: Any) -> None:
    """Work of one process; what can't resume by itself is made in a separate folder, which then takes its place."""
    if stage.resumes:
        stage.work(workshop, out)
        return
    partial = out / f".{stage.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stage.work(workshop, partial)
    for place in stage.folders:
        shutil.rmtree(out / place, ignore_errors=True)  # left by a kill between this and the next line, and not finished
        (partial / place).rename(out / place)
    partial.rmdir()


def _end(step: Step, lock: Lock, seconds: float) -> None:
    lock.records[step.stage.name] = Record.of(step.made_from, lock.folder, step.stage.folders, seconds)
    lock.write()


def _set_aside(out: Path, folders: Sequence[str]) -> None:
    """Rename what was made before to NAME.1, NAME.2, ..., the first that is free."""
    for name in folders:
        if (out / name).exists():
            kept = (out / name).rename(aside(out / name))
            note(f"  what {name} held is kept as {kept.name}")


def _say(number: int, total: int, step: Step) -> None:
    words = {
        "unchanged": f"unchanged, skipping (lock {step.identity[:4]})",
        "new": "",
        "resumed": "resumes where it stopped",
        "stale": "runs again:",
    }[step.state]
    note(f"{number}/{total} {step.stage.name:<9} {words}".rstrip())
    for reason in step.reasons[:SHOWN]:
        note(f"    {reason}")
    if len(step.reasons) > SHOWN:
        note(f"    and {len(step.reasons) - SHOWN} more")


def _keep_settings(resolved: Resolved, lock: Lock) -> None:
    """Write the settings as resolved, every one of them, into the run: that file makes the same run again."""
    resolved.out.mkdir(parents=True, exist_ok=True)
    with atomic(resolved.out / SETTINGS) as temporary:
        temporary.write_text(settings_text(resolved), encoding="utf-8")
    lock.keep(SETTINGS)
    lock.write()


def settings_text(resolved: Resolved) -> str:
    """The settings as resolved, with whole paths, so that they mean the same wherever the file lies."""
    values: dict[str, Any] = {}
    for name, value in values_of(resolved.config):
        *above, last = name.split(".")
        section = values
        for key in above:
            section = section.setdefault(key, {})
        local = isinstance(value, str) and last in ("path", "base", "adapter", "tokenizer", "data", "model", "training")
        section[last] = str(Path(resolved.place(value)).resolve()) if local and Path(resolved.place(value)).exists() else value
    values["out"] = str(resolved.out.resolve())
    return commented(values, "Written by whence run: all settings of this run.")

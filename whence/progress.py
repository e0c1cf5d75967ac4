"""Progress of long work, as events: whoever shows them is passed in, or found by where this runs (terminal, notebook, log).

with stage("covariance", total=8192, unit="tokens") as advance:
    for batch in batches:
        ...
        advance(batch.tokens)
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class Stage:
    """One stretch of work: `done` of `total` units since `started` (seconds, monotonic)."""

    name: str
    total: int
    unit: str = "examples"
    done: int = 0
    resumed: int = 0
    """Units that an earlier, interrupted run had done; they say nothing about today's speed."""
    started: float = field(default_factory=lambda: time.monotonic())

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Seconds left at the speed so far; None before the first unit is done."""
        fresh = self.done - self.resumed
        return None if fresh <= 0 else self.elapsed * (self.total - self.done) / fresh


class Reporter(Protocol):
    """Receives the events of all stages."""

    def begin(self, stage: Stage) -> None: ...
    def advance(self, stage: Stage) -> None: ...
    def end(self, stage: Stage) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """Shows nothing."""

    def begin(self, stage: Stage) -> None:
        """Ignore it."""

    def advance(self, stage: Stage) -> None:
        """Ignore it."""

    def end(self, stage: Stage) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""


class Automatic:
    """The default: whatever suits the place, unless `quiet()` was called, or `report_to` names a reporter (in any thread)."""

    quiet, told = False, 0

    def begin(self, stage: Stage) -> None:
        self._shown().begin(stage)

    def advance(self, stage: Stage) -> None:
        self._shown().advance(stage)

    def end(self, stage: Stage) -> None:
        self._shown().end(stage)

    def note(self, text: str) -> None:
        self._shown().note(text)

    def _shown(self) -> Reporter:
        return _SILENT if self.quiet or self.told else self._here

    @functools.cached_property
    def _here(self) -> Reporter:
        from whence.show.bars import here

        return here(_SILENT)


_SILENT, _AUTOMATIC = Silent(), Automatic()
_reporter: contextvars.ContextVar[Reporter] = contextvars.ContextVar("reporter", default=_AUTOMATIC)


def quiet(on: bool = True) -> None:
    """Show no progress and no notes from here on; `quiet(False)` shows them again.

    Without it, work that takes longer than a moment shows how far it is and how long it will take: bars on a terminal, a line
    in the cell of a notebook, and a line every ten seconds where stderr goes to a file.
    """
    _AUTOMATIC.quiet = bool(on)


@contextlib.contextmanager
def report_to(reporter: Reporter) -> Iterator[None]:
    """Send the events of the enclosed work to `reporter`."""
    token = _reporter.set(reporter)
    try:
        with as_told():
            yield
    finally:
        _reporter.reset(token)


@contextlib.contextmanager
def as_told() -> Iterator[None]:
    """Show the progress of the enclosed work, in all its threads, only to whoever `report_to` names."""
    _AUTOMATIC.told += 1
    try:
        yield
    finally:
        _AUTOMATIC.told -= 1


def current() -> Reporter:
    """Who receives the events now."""
    return _reporter.get()


@contextlib.contextmanager
def notes_only() -> Iterator[None]:
    """Report the notes of the enclosed work, but not its stages: they are parts of one that is reported already."""
    inner = Silent()
    inner.note = _reporter.get().note  # type: ignore[method-assign]
    with report_to(inner):
        yield


def note(text: str) -> None:
    """Report one line that a user should see (coverage, truncation, a halved batch)."""
    _reporter.get().note(text)


@contextlib.contextmanager
def stage(name: str, total: int, unit: str = "examples", done: int = 0) -> Iterator[Callable[[int], None]]:
    """Report a stretch of `total` units, `done` of which an earlier run did; yields `advance(n)`."""
    reporter, current = _reporter.get(), Stage(name, total, unit, done=done, resumed=done)
    reporter.begin(current)

    def advance(units: int) -> None:
        current.done += units
        reporter.advance(current)

    try:
        yield advance
    finally:
        reporter.end(current)

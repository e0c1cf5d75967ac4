"""Progress for people: bars on a terminal, plain lines in a log, one line of a notebook's cell."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from whence import dist
from whence.escapes import visible
from whence.show.markup import framed, line, shown

if TYPE_CHECKING:
    from whence.progress import Reporter, Stage

SOON, AGAIN, EVERY = 0.5, 60.0, 10.0
"""Seconds: of work before a bar is shown, before the same note is said again, and between lines of a log."""


def here(silent: Reporter) -> Reporter:
    """Who shows the progress of a library that was not told: by where its process runs; only the first of several does."""
    if dist.rank() > 0:
        return silent
    if (shell := _notebook()) is not None:
        return Cells(shell)
    console = Console(stderr=True, highlight=False)
    return Passing(console) if console.is_terminal else Lines(console, Outlook(None), EVERY, least=EVERY)


def _notebook() -> Any:
    """The shell of a notebook, where this is one."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return shell if shell is not None and hasattr(shell, "kernel") else None


class Passing:
    """Bars on a terminal while there is work, where nobody says when it begins and ends; what is quick shows none."""

    def __init__(self, console: Console):
        self.console, self.outlook = console, Outlook(None)
        self.bars: Bars | None = None
        self.notes: dict[str, float] = {}
        self.begun: set[int] = set()

    def begin(self, stage: Stage) -> None:
        """Wait whether it takes long."""

    def advance(self, stage: Stage) -> None:
        if id(stage) not in self.begun:
            if stage.elapsed < SOON:
                return
            if self.bars is None:
                self.bars = Bars(self.console, self.outlook).__enter__()
            self.begun.add(id(stage))
            self.bars.begin(stage)
        if self.bars is not None:
            self.bars.advance(stage)

    def end(self, stage: Stage) -> None:
        if id(stage) in self.begun and self.bars is not None:
            self.begun.discard(id(stage))
            self.bars.end(stage)
            if not self.begun:
                self.bars, bars = None, self.bars
                bars.__exit__()

    def note(self, text: str) -> None:
        if time.monotonic() - self.notes.get(text, -AGAIN) < AGAIN:
            return
        self.notes[text] = time.monotonic()
        (self.bars.progress.console if self.bars else self.console).print(visible(text), markup=False, soft_wrap=True)


class Cells:
    """One output of a notebook's cell, drawn again as the work goes on: plain HTML, no widget."""

    def __init__(self, shell: Any):
        self.shell, self.cell, self.handle = shell, None, None
        self.now: dict[int, Stage] = {}
        self.done: list[str] = []
        self.notes: list[str] = []
        self.drawn = 0.0

    def begin(self, stage: Stage) -> None:
        self._turn()
        self.now[id(stage)] = stage
        self._draw()

    def advance(self, stage: Stage) -> None:
        self._draw()

    def end(self, stage: Stage) -> None:
        if self.now.pop(id(stage), None) is not None:
            self.done.append(f"{stage.name} {span(stage.elapsed)}")
            self._draw(soon=False)

    def note(self, text: str) -> None:
        self._turn()
        if text not in self.notes:
            self.notes.append(text)
            self._draw(soon=False)

    def _turn(self) -> None:
        """Begin a new output in a new cell."""
        if self.cell != self.shell.execution_count:
            self.cell, self.handle = self.shell.execution_count, None
            self.done, self.notes, self.now = [], [], {}

    def _draw(self, soon: bool = True) -> None:
        if soon and self.handle is not None and time.monotonic() - self.drawn < SOON / 2:
            return
        from IPython.display import HTML, display  # type: ignore[import-not-found]

        self.drawn = time.monotonic()
        page = HTML(self.html())
        if self.handle is None:
            self.handle = display(page, display_id=True)
        else:
            self.handle.update(page)

    def html(self) -> str:
        """What is under way, what is done, and the notes."""
        parts = [_bar(stage) for stage in self.now.values()]
        parts += [line(", ".join(self.done), faint=True)] if self.done else []
        return framed("", *parts, *(line(text, faint=not text.startswith("warning")) for text in self.notes))


def _bar(stage: Stage) -> Markup:
    """A stage under way; with the time left, once that can be told."""
    left = "" if stage.left is None else f", {span(stage.left)} left"
    words = f"{stage.name} {stage.done:,}/{stage.total:,} {stage.unit}{left}"
    share = 100 * stage.done / max(1, stage.total)
    return Markup('<div><progress value="{:.0f}" max="100"></progress> {}</div>').format(share, shown(words))


class Outlook:
    """Guesses the time left for all stages: those to come take as long as those so far do on average."""

    def __init__(self, stages: int | None):
        self.stages, self.took = stages, []

    def end(self, stage: Stage) -> None:
        """Learn how long a stage took."""
        self.took.append(stage.elapsed)

    def left(self, stage: Stage) -> float | None:
        """Seconds left for the whole during `stage`; None when unknown."""
        if self.stages is None or stage.left is None:
            return None
        lengths = [*self.took, stage.elapsed + stage.left]
        return stage.left + max(self.stages - len(lengths), 0) * sum(lengths) / len(lengths)

    def describe(self, stage: Stage) -> str:
        """Say the time left for the stage and, where it is another, for the whole."""
        if stage.left is None:
            return ""
        whole = self.left(stage)
        words = f"{span(stage.left)} left"
        return words if whole is None or whole <= stage.left else f"{words}, about {span(whole)} for the whole"


class Bars:
    """One bar per stage, on a terminal. What two stages have to note is said once."""

    def __init__(self, console: Console, outlook: Outlook):
        self.outlook, self.said = outlook, set[str]()
        self.tasks: dict[int, TaskID] = {}
        self.progress = Progress(
            TextColumn("  {task.description:<14}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[time]}", style="dim"),
            console=console,
        )

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.progress.stop()

    def begin(self, stage: Stage) -> None:
        self.tasks[id(stage)] = self.progress.add_task(
            stage.name, total=stage.total, completed=stage.done, unit=stage.unit, time=""
        )

    def advance(self, stage: Stage) -> None:
        self.progress.update(self.tasks[id(stage)], completed=stage.done, time=self.outlook.describe(stage))

    def end(self, stage: Stage) -> None:
        self.outlook.end(stage)
        self.progress.update(self.tasks.pop(id(stage)), completed=stage.done, time=span(stage.elapsed))

    def note(self, text: str) -> None:
        if text in self.said:
            return
        self.said.add(text)
        self.progress.console.print(visible(text), markup=False, style="yellow" if text.startswith("warning") else None)


class Lines:
    """Plain lines for logs: one every `every` seconds at most, and one when a stage ends that took `least` seconds."""

    def __init__(self, console: Console, outlook: Outlook, every: float = 5.0, least: float = 0.0):
        self.console, self.outlook, self.every, self.least, self.said = console, outlook, every, least, set[str]()
        self.last = time.monotonic()

    def begin(self, stage: Stage) -> None:
        """Wait until there is something to say."""

    def advance(self, stage: Stage) -> None:
        if time.monotonic() - self.last >= self.every and stage.elapsed >= self.least:
            self._say(stage, self.outlook.describe(stage))

    def end(self, stage: Stage) -> None:
        self.outlook.end(stage)
        if stage.elapsed >= self.least:
            self._say(stage, span(stage.elapsed))

    def note(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self._print(visible(text))

    def _say(self, stage: Stage, timing: str) -> None:
        self.last = time.monotonic()
        self._print(f"  {stage.name:<14} {stage.done:,}/{stage.total:,} {stage.unit}  {timing}".rstrip())

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


def span(seconds: float) -> str:
    """Say a duration as people do: 0.4 s, 14 s, 6 min, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

"""The terminal: data to stdout, progress and everything else to stderr."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from whence import dist
from whence.cli.options import Session
from whence.errors import WhenceError, WhenceWarning
from whence.escapes import HIDDEN, visible, visible_json
from whence.progress import Stage, note, report_to
from whence.settings import Fit

WIDTH = 132
"""Columns of a table that goes to a file."""


class Terminal(Console):
    """A console on which text of users' files can't act: controls in it are shown as Python writes them.

    Strings are changed before they are measured, so that tables stay aligned; a `Text` is best made of `visible` pieces.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Make text of a string."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Render anything that can be printed."""
        for segment in super().render(renderable, options):
            plain = segment.control or not HIDDEN.search(segment.text)
            yield segment if plain else Segment(visible(segment.text), segment.style)


out = Terminal(highlight=False)
err = Terminal(stderr=True, highlight=False)


def say(line: str, style: str | None = None) -> None:
    """Print a line to stdout as it is, however long."""
    out.print(line, markup=False, soft_wrap=True, style=style)


def print_json(value: Any) -> None:
    """Print a value to stdout as one line of JSON."""
    print(visible_json(value))


def coloured() -> bool:
    """Whether colours can be seen on stdout."""
    return out.is_terminal and not out.no_color


def show_table(table: Table) -> None:
    """Print a table to stdout: as wide as the terminal, `WIDTH` columns elsewhere, and wider where numbers would be cut."""
    to = out if out.is_terminal else Terminal(file=out.file, width=WIDTH, highlight=False)
    needed = to.measure(table, options=to.options.update(width=10 * WIDTH)).minimum
    to.print(table, width=max(to.width, needed), crop=False)


def print_table(
    names: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,), *, no_wrap: bool = True, **look: Any
) -> None:
    """Print rows below the names of their columns, which are aligned to the right but for those on the `left`.

    Where there is no room, what is on the left goes on below; numbers are never cut.
    """
    table, rows = Table(box=None, **look), list(rows)
    for number, name in enumerate(names):
        if number in left:
            table.add_column(name, overflow="fold")
        else:
            widest = max(cell_len(visible(cell)) for cell in (name, *(row[number] for row in rows)))
            table.add_column(name, justify="right", no_wrap=no_wrap, min_width=widest if no_wrap else None)
    for row in rows:
        table.add_row(*row)
    show_table(table)


@contextlib.contextmanager
def reporting(stages: int | None = None, *, quiet: bool = False) -> Iterator[None]:
    """Show the progress of the enclosed work: bars on a terminal, plain lines elsewhere, nothing when quiet.

    With the number of `stages` that the work has, the time left for the whole is shown too. Of several processes that
    work together only the first shows any.
    """
    if quiet or dist.rank() > 0:
        yield
    elif err.is_terminal:
        with Bars(err, Outlook(stages)) as bars, report_to(bars):
            yield
    else:
        with report_to(Lines(err, Outlook(stages))):
            yield


@contextlib.contextmanager
def start(session: Session, stages: int | None = None) -> Iterator[None]:
    """Progress, notes and our own warnings to stderr; those of the libraries beneath only when verbose."""
    with reporting(stages, quiet=session.quiet), warnings.catch_warnings():
        warnings.simplefilter("default" if session.verbose else "ignore")
        warnings.simplefilter("always", WhenceWarning)
        warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
        if not session.verbose:
            from transformers.utils import logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
        yield


def warn_if_untrained(model: Any, task: Any, rows: Any) -> None:
    """Say loudly when the model likes the training rows no better than the same tokens in disorder."""
    from whence.tasks import CausalLM
    from whence.train.evidence import evidence_of_training

    if not isinstance(task, CausalLM):
        return
    evidence = evidence_of_training(model, task, rows)
    if not evidence.learnt:
        note(
            f"warning: this model shows no sign of training on this data: loss {evidence.loss:.2f} nats per token, "
            f"{evidence.shuffled:.2f} with the tokens shuffled. Are these the fine-tuned weights? [WHENCE-03]"
        )


def fit_stages(settings: Fit) -> int:
    """How many stages a fit has."""
    return settings.groups * {"identity": 0, "diagonal": 1, "kfac": 2}.get(settings.method, 3)


def score_stages(rescore: int) -> int:
    """How many stages scoring has."""
    return 4 if rescore else 2


@contextlib.contextmanager
def as_one() -> Iterator[None]:
    """Run a command in several processes that look like one: only the first is heard, unless another one fails alone."""
    dist.start()
    before, muted = signal.signal(signal.SIGTERM, _on_end), io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            if dist.rank() > 0:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                stack.enter_context(contextlib.redirect_stderr(muted))
            yield
        dist.leave()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            dist.leave()
            raise
        dist.fail()
        if dist.rank() == 0:
            raise
        if dist.first_failed():
            raise SystemExit(error.code if isinstance(error, SystemExit) else 1) from None
        print(f"process {dist.rank()} of {dist.world()}: {muted.getvalue().rstrip()}", file=sys.stderr, flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_end(number: int, frame: object) -> NoReturn:
    raise WhenceError(
        "This run was ended from outside: another of its processes failed, or somebody stopped it.",
        fix="see what the others said; the same command goes on, and what was saved is kept",
    )


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
        self.progress.console.print(text, markup=False, style="yellow" if text.startswith("warning") else None)


class Lines:
    """Plain lines for logs: one every `every` seconds at most, and one when a stage ends."""

    def __init__(self, console: Console, outlook: Outlook, every: float = 5.0):
        self.console, self.outlook, self.every, self.said = console, outlook, every, set[str]()
        self.last = time.monotonic()

    def begin(self, stage: Stage) -> None:
        """Wait until there is something to say."""

    def advance(self, stage: Stage) -> None:
        if time.monotonic() - self.last >= self.every:
            self._say(stage, self.outlook.describe(stage))

    def end(self, stage: Stage) -> None:
        self.outlook.end(stage)
        self._say(stage, span(stage.elapsed))

    def note(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self._print(text)

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

"""The terminal: data to stdout, progress and everything else to stderr."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from whence import dist
from whence.cli.options import Session
from whence.errors import WhenceError, WhenceWarning
from whence.escapes import HIDDEN, visible, visible_json
from whence.progress import note, report_to
from whence.settings import Fit
from whence.show.bars import Bars, Lines, Outlook

WIDTH = 132
"""Columns of what goes to a file or a pipe."""


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


out = Terminal(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
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
    needed = out.measure(table, options=out.options.update(width=10 * WIDTH)).minimum
    out.print(table, width=max(out.width, needed), crop=False)


def print_table(
    names: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,), *, no_wrap: bool = True, **look: Any
) -> None:
    """Print rows below the names of their columns, which are aligned to the right but for those on the `left`.

    Where there is no room, what is on the left continues below; numbers are never cut.
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

    With the number of `stages` that the work has, the time left for the whole is shown too. If several processes
    work together, only the first shows any.
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
    """Progress, notes and our own warnings to stderr; those of the libraries underneath only when verbose."""
    with reporting(stages, quiet=session.quiet), warnings.catch_warnings():
        warnings.simplefilter("default" if session.verbose else "ignore")
        warnings.simplefilter("always", WhenceWarning)
        warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
        if not session.verbose:
            from transformers.utils import logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
        yield


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
        "This run was terminated: another of its processes failed, or somebody stopped it.",
        fix="see what the other processes printed; the same command resumes from what was saved",
    )

"""Progress without being asked: what suits the place, silenced by one call, and out of the way of whoever shows it himself."""

import io
import sys
import types

import pytest
from rich.console import Console

from whence import progress
from whence.progress import Silent, note, quiet, report_to, stage
from whence.show import bars
from whence.show.bars import Cells, Lines, Passing


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    for module in (progress, bars):  # not time itself, by which a server in another thread waits
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def aloud(monkeypatch):
    """The library as users have it, with a place that the test gives."""

    def show_in(reporter):
        monkeypatch.setattr(bars, "here", lambda silent: reporter)
        progress._AUTOMATIC.__dict__.pop("_here", None)
        quiet(False)

    yield show_in
    progress._AUTOMATIC.__dict__.pop("_here", None)
    quiet()


def work(clock, seconds: float, steps: int = 4):
    with stage("covariance", steps, "tokens") as advance:
        for _ in range(steps):
            clock[0] += seconds
            advance(1)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)


def test_a_terminal_has_a_bar_with_the_time_left_for_work_that_takes_a_while(clock, aloud):
    console = terminal()
    aloud(Passing(console))
    work(clock, 0.01)
    assert console.file.getvalue() == ""  # too quick to be shown
    work(clock, 2.0)
    text = console.file.getvalue()
    assert "covariance" in text and "4/4 tokens" in text and "8.0 s" in text


def test_a_log_has_a_line_now_and_then(clock, aloud):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    aloud(Lines(console, bars.Outlook(None), bars.EVERY, least=bars.EVERY))
    work(clock, 1.0)
    assert console.file.getvalue() == ""
    work(clock, 6.0)
    assert console.file.getvalue().splitlines() == [
        "  covariance     2/4 tokens  12 s left",
        "  covariance     4/4 tokens  0.0 s left",
        "  covariance     4/4 tokens  24 s",
    ]


class Handle:
    def __init__(self):
        self.pages = []

    def update(self, page):
        self.pages.append(page)


def test_a_notebook_has_one_output_that_is_drawn_again(clock, aloud, monkeypatch):
    shown = []

    def display(page, display_id):
        shown.append(Handle())
        shown[-1].update(page)
        return shown[-1]

    fake = types.ModuleType("IPython.display")
    fake.HTML, fake.display = str, display
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    shell = types.SimpleNamespace(execution_count=1, kernel=object())
    aloud(Cells(shell))
    note("warning: <b>odd</b>")
    work(clock, 1.0)
    assert len(shown) == 1
    middle, last = next(page for page in shown[0].pages if "3/4 tokens" in page), shown[0].pages[-1]
    assert "<progress" in middle and "1.0 s left" in middle
    assert "covariance 4.0 s" in last and "<progress" not in last and "warning: &lt;b&gt;odd" in last
    shell.execution_count = 2
    work(clock, 1.0)
    assert len(shown) == 2 and "odd" not in shown[1].pages[-1]


def test_the_place_is_found(monkeypatch):
    silent = Silent()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(bars.here(silent), Lines)
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert isinstance(bars.here(silent), Cells)
    monkeypatch.setattr("whence.dist.rank", lambda: 1)
    assert bars.here(silent) is silent


def test_one_call_silences_it_and_so_does_whoever_shows_it_himself(aloud, notes):
    console = terminal()
    aloud(Passing(console))
    note("one")
    note("one")  # said a moment ago
    assert notes == ["one", "one"] and console.file.getvalue() == ""  # the test itself listens
    progress._AUTOMATIC.note("in a thread of its own")
    assert console.file.getvalue() == ""
    with report_to(progress._AUTOMATIC):
        note("two")
    assert console.file.getvalue() == ""


def test_quiet_is_quiet(aloud):
    console = terminal()
    aloud(Passing(console))
    note("one")
    note("one")
    quiet()
    note("two")
    quiet(False)
    note("three \x1b[31m")
    assert console.file.getvalue().split("\n") == ["one", "three \\x1b[31m", ""]

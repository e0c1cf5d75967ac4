import io
import itertools

import pytest
from rich.console import Console

from whence import progress
from whence.cli.console import reporting
from whence.progress import Stage, note, stage
from whence.show import bars
from whence.show.bars import Bars, Lines, Outlook, span


@pytest.fixture
def clock(monkeypatch):
    """Time stands still until a test moves it on."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    for module in (progress, bars):  # not time itself, by which a server in another thread waits
        monkeypatch.setattr(module, "time", clock)
    return clock


def console(**options):
    return Console(file=io.StringIO(), width=120, highlight=False, **options)


def work(reporter, clock, name, steps, seconds):
    """Report a stage of `steps` units that takes `seconds` for each."""
    stage = Stage(name, total=steps, started=clock.now)
    reporter.begin(stage)
    for _ in range(steps):
        clock.now += seconds
        stage.done += 1
        reporter.advance(stage)
    reporter.end(stage)


def test_lines_are_few(clock):
    to = console()
    lines = Lines(to, Outlook(None))
    lines.note("coverage 66 of 155 modules [69 %]")
    work(lines, clock, "covariance", 100, 0.5)
    said = to.file.getvalue().splitlines()
    assert said[0] == "coverage 66 of 155 modules [69 %]"
    assert said[1] == "  covariance     10/100 examples  45 s left"
    assert said[-1] == "  covariance     100/100 examples  50 s"
    assert len(said) == 1 + 10 + 1


def test_the_whole_is_guessed_from_the_stages_so_far(clock):
    to = console()
    lines = Lines(to, Outlook(4))
    work(lines, clock, "covariance", 10, 2.0)
    work(lines, clock, "lambda", 8, 5.0)
    # half of the second stage is left (20 s), and two more of (20 + 40) / 2 s
    assert any("20 s left, about 80 s for the whole" in line for line in to.file.getvalue().splitlines())


def test_what_an_earlier_run_did_says_nothing_about_todays_speed(clock):
    resumed = Stage("score", total=100, done=90, resumed=90, started=clock.now)
    assert Outlook(1).describe(resumed) == ""
    clock.now += 10
    resumed.done = 95
    assert Outlook(1).describe(resumed) == "10 s left"


def test_bars_show_each_stage(clock):
    to = console(force_terminal=True)
    with Bars(to, Outlook(2)) as bars:
        bars.note("adapter [a] on base b")
        work(bars, clock, "covariance", 3, 1.0)
        work(bars, clock, "lambda", 3, 1.0)
    shown = to.file.getvalue()
    for text in ("adapter [a] on base b", "covariance", "lambda", "3/3 examples", "3.0 s"):
        assert text in shown


def test_progress_goes_to_stderr_and_quiet_is_quiet(capsys):
    for quiet in (False, True):
        with reporting(quiet=quiet), stage("score", total=2) as advance:
            note("half" if not quiet else "nothing")
            advance(2)
    shown = capsys.readouterr()
    assert shown.out == "" and "half" in shown.err and "2/2 examples" in shown.err and "nothing" not in shown.err


def test_spans_grow():
    seconds = [0.04, 9.9, 9.96, 99.4, 99.6, 3569, 3571, 7500]
    assert [span(s) for s in seconds] == ["0.0 s", "9.9 s", "10 s", "99 s", "2 min", "59 min", "1 h 00 min", "2 h 05 min"]
    assert all(a < b for a, b in itertools.pairwise(seconds))

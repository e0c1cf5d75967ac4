"""Measuring in the quiet moments of a shared machine: what its host gives to others makes CPU seconds longer as well.

Two signs of it: processor time that the host took, and a small piece of work that takes longer than it did at best, since
neighbours also share caches, memory and the cores' units without taking any time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

DISTURBED = 0.15
"""Share of one processor that the host may take while something is measured."""

SLOWED = 0.75
"""How much longer than at best the small piece of work may take before or after."""

TRIES, SHORT, LONG = 3, 1.0, 60.0
"""How often to measure what is disturbed; the seconds below which the system's ticks don't tell whether it is, and above
which a run meets quiet and loud moments like any other of its length."""

Measured = TypeVar("Measured")


def stolen_seconds() -> float:
    """Processor time that the host has taken from this machine; 0 where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    except OSError:
        return 0.0
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0


def pace() -> float:
    """Seconds of a small piece of work, the best of five: 32 MB copied, and a few million products on one core."""
    source, square = np.ones(4_000_000), np.ones((160, 160), dtype=np.float32)
    target, best = np.empty_like(source), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        np.einsum("ij,jk->ik", square, square)
        best = min(best, time.perf_counter() - start)
    return best


class Quiet:
    """Repeats what was disturbed, and waits for a quiet moment before: that may take `patience` seconds in all."""

    def __init__(
        self,
        say: Callable[[str], None],
        patience: float = 0.0,
        stolen: Callable[[], float] = stolen_seconds,
        pace: Callable[[], float] = pace,
    ):
        self.say, self.patience, self.stolen, self.pace = say, patience, stolen, pace
        self.best = float("inf")

    def measure(self, run: Callable[[], Measured]) -> tuple[Measured, float]:
        """What `run` gives the least disturbed of up to `TRIES` times, and how disturbed: 1 is at the bounds.

        Once patience has run out nothing is repeated.
        """
        found: list[tuple[float, Measured]] = []
        while True:
            result, disturbed, seconds = self._once(run)
            found.append((disturbed, result))
            once = disturbed <= 1 or not SHORT <= seconds <= LONG
            if once or len(found) == TRIES or self.patience <= 0:
                least, result = min(found, key=lambda pair: pair[0])
                return result, least
            self.say(f"disturbed {disturbed:.1f} times as much as may be: once more when it is quiet")
            self.patience -= seconds
            self.wait()

    def wait(self) -> None:
        """Until next to nothing disturbs a processor that is busy, or patience has run out."""
        while self.patience > 0:
            start = time.perf_counter()
            _, disturbed, _ = self._once(_busy)
            if disturbed <= 0.5:
                return
            time.sleep(3)
            self.patience -= time.perf_counter() - start

    @contextlib.contextmanager
    def at_its_expense(self) -> Iterator[None]:
        """What is done inside counts against patience."""
        start = time.perf_counter()
        yield
        self.patience -= time.perf_counter() - start

    def _once(self, run: Callable[[], Measured]) -> tuple[Measured, float, float]:
        """The result, how disturbed it was, and the seconds."""
        paces = [self.pace()]
        before, start = self.stolen(), time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        share = (self.stolen() - before) / seconds
        paces.append(self.pace())
        self.best = min(self.best, *paces)
        slowed = max(paces) / self.best - 1
        return result, max(share / DISTURBED, slowed / SLOWED), seconds


def _busy() -> None:
    end = time.perf_counter() + 1
    while time.perf_counter() < end:
        pass

"""Measuring in the quiet moments of a shared machine: what its host gives to others makes CPU seconds longer as well."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

DISTURBED = 0.15
"""Share of one processor that the host may take while something is measured."""

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


class Quiet:
    """Repeats what was disturbed, and waits for a quiet moment before, `patience` seconds in all."""

    def __init__(self, say: Callable[[str], None], patience: float = 300.0, stolen: Callable[[], float] = stolen_seconds):
        self.say, self.patience, self.stolen = say, patience, stolen

    def measure(self, run: Callable[[], Measured]) -> tuple[Measured, float]:
        """What `run` gives the least disturbed of up to `TRIES` times, and the share of a processor taken meanwhile.

        Once patience has run out nothing is repeated.
        """
        found: list[tuple[float, Measured]] = []
        while True:
            result, share, seconds = self._once(run)
            found.append((share, result))
            once = share <= DISTURBED or not SHORT <= seconds <= LONG
            if once or len(found) == TRIES or self.patience <= 0:
                best, result = min(found, key=lambda pair: pair[0])
                return result, best
            self.say(f"the host took {share:.0%} of a processor: once more when it is quiet")
            self.wait()

    def wait(self) -> None:
        """Until the host takes next to nothing from a processor that is busy, or patience has run out."""
        while self.patience > 0:
            start = time.perf_counter()
            _, share, _ = self._once(_busy)
            if share <= DISTURBED / 2:
                return
            time.sleep(3)
            self.patience -= time.perf_counter() - start

    def _once(self, run: Callable[[], Measured]) -> tuple[Measured, float, float]:
        """The result, the share of a processor taken, and the seconds."""
        before, start = self.stolen(), time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        return result, (self.stolen() - before) / seconds, seconds


def _busy() -> None:
    end = time.perf_counter() + 1
    while time.perf_counter() < end:
        pass

"""Work that is killed in the middle: what its next run says, and what it does again."""

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whence.progress import Silent, report_to


class Killed(Exception):
    """In place of a kill."""


class Killer(Silent):
    """Raises at the `left`-th advance of a stage (None: any), or at its `begin` or `end`; counts what all stages did."""

    def __init__(self, stage: str | None = None, left: int = -1, at: str = "advance"):
        self.stage, self.left, self.at = stage, left, at
        self.resumed = defaultdict[str, list[int]](list)
        """What was done before, each time that a stage of the name began."""
        self.advances, self.done = Counter[str](), dict[str, int]()
        """How often a stage of the name went on, and how much the last one did."""

    def begin(self, stage):
        self.resumed[stage.name].append(stage.resumed)
        self._count("begin", stage)

    def advance(self, stage):
        self.advances[stage.name] += 1
        self.done[stage.name] = stage.done - stage.resumed
        self._count("advance", stage)

    def end(self, stage):
        self._count("end", stage)

    def _count(self, what, stage):
        if what == self.at and self.stage in (None, stage.name):
            self.left -= 1
            if not self.left:
                raise Killed


def killed_and_resumed(work: Callable[[Path], Any], folder: Path, stage: str, left: int = 1, at: str = "advance") -> Killer:
    """Do the work at once, and killed and resumed: scores and files must be the same; returns what the resumed run did."""
    whole = work(folder / "whole")
    with pytest.raises(Killed), report_to(Killer(stage, left, at)):
        work(folder / "killed")
    with report_to(seen := Killer()):
        resumed = work(folder / "killed")
    np.testing.assert_array_equal(resumed.raw, whole.raw)
    assert resumed.about == whole.about
    assert {file.name for file in (folder / "killed").iterdir()} == {file.name for file in (folder / "whole").iterdir()}
    return seen

"""A question that was asked, with all that is known of it so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from whence.data import Rows
from whence.serve.requests import Question
from whence.store.scores import Scores


@dataclass(frozen=True)
class Saved:
    """A question of scores in a folder."""

    folder: Path
    number: int
    name: str
    """What `whence show --query` calls it."""


@dataclass
class Asked:
    """A question with its scores."""

    key: str
    queries: Rows | None
    scores: Scores
    """Of one query: of all rows, or of those that were scored exactly."""
    scan: dict[str, Any]
    question: Question | None = None
    estimates: np.ndarray | None = None
    """What the index said of every row, `[N]`; None where all rows were scored."""
    columns: list[int] = field(default_factory=list)
    """Which of these were scored exactly."""
    seconds: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, dict[str, Any]] = field(default_factory=dict)
    documents: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By how many rows they show."""
    parts: Scores | None = None
    """The same by module, once somebody asked for a cell of the map."""
    stage: str = ""
    """Of training, which the rows are from; empty where there is one, or where they are from all."""
    stages: Sequence[Mapping[str, Any]] = ()
    """What went through each."""
    saved: Saved | None = None
    """Where it is from, if it was not asked here."""

    @property
    def values(self) -> np.ndarray:
        """The value of every row: as it was scored, else as it was estimated."""
        exact = self.scores.values_of(0)
        if self.estimates is None:
            return exact
        values = self.estimates.copy()
        values[self.columns] = exact
        return values

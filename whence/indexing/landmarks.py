"""Scores of earlier questions as an index: a new question is written as a sum of them, and so are its scores.

    landmarks = Landmarks(whence.score(model, task, hundreds_of_questions, train, operator))
    estimates = landmarks.search(model, task, queries, operator)

Nystroem's approximation (Williams & Seeger 2001) of the kernel `k(q, z) = grad m(q)^T operator grad log p(z)`: with `J`
landmark questions, `K [J, J]` their scores with one another, `k [Q, J]` those of the queries with them and `A [J, N]` those of
all rows with them, the estimate is `k (K + e mean(diag K))^-1 A`. It is as good as the landmarks are like what is asked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from whence.data.load import as_rows
from whence.data.rows import Rows
from whence.engine.point import Point
from whence.errors import StaleArtifact, UsageError
from whence.operators import Operator
from whence.scoring.score import score_points
from whence.settings import Score
from whence.store.fingerprint import fingerprint_operator
from whence.store.manifest import Folder, differences, within
from whence.store.scores import SHARD, Scores, open_scores
from whence.tasks.base import Task

RIDGE = 0.01
"""`e`: how much the landmarks' scores with one another are damped, in units of the mean of those with themselves."""


class Landmarks:
    """Scores `[J, N]` of landmark questions; `provenance` is that of the folder they are kept in, if they are."""

    def __init__(self, scores: Scores, provenance: Mapping[str, Any] | None = None):
        contrasts = [text for text in scores.queries["contrast"] if isinstance(text, str)]
        if scores.about.get("measurement") != "logprob" or contrasts:
            raise UsageError(
                "These scores can't be landmarks",
                given=f"{scores.about.get('measurement')} of their queries, or contrasts",
                accepted="scores of log-probabilities, whose gradients rows have too",
                fix="whence score --measurement logprob",
            )
        self.scores, self.provenance = scores, provenance or {}
        self._grams: dict[str, np.ndarray] = {}
        """`K`, by the weights that it was made with."""

    def __len__(self) -> int:
        return len(self.scores.queries)

    @functools.cached_property
    def questions(self) -> Rows:
        """The landmarks as rows."""
        columns = (list(self.scores.queries[name]) for name in ("prompt", "completion", "text"))
        rows: list[Any] = [
            {"prompt": prompt, "completion": completion} if isinstance(completion, str) else text
            for prompt, completion, text in zip(*columns, strict=True)
        ]
        return as_rows(rows)

    def search(
        self, model: nn.Module, task: Task, queries: Any, operator: Operator, *, batch_tokens: int | None = None
    ) -> Scores:
        """Estimate what `whence.score(model, task, queries, data, operator)` gives, without a pass over the data.

        Raises StaleArtifact where the landmarks were scored with another model or operator, UsageError.
        """
        point = Point(model, task, self.questions, batch_tokens=batch_tokens)
        self._check(point, operator)
        settings = Score(check=False, batch_tokens=batch_tokens)
        asked = score_points(point, point, queries, operator, settings)
        weights = point.fingerprint["weights"]
        if weights not in self._grams:
            self._grams[weights] = score_points(point, point, self.questions, operator, settings).raw.astype(np.float64)
        raw = nystroem(asked.raw, self._grams[weights], self.scores.raw)
        about = {**asked.about, "landmarks": len(self)}
        return replace(asked, raw=raw, n_train=self.scores.n_train, examples=self.scores.examples, about=about)

    def _check(self, point: Point, operator: Operator) -> None:
        """Raise StaleArtifact for another operator or, where it is known, another model."""
        made, now = {"operator": {"label": self.scores.about["operator"]}}, {"operator": {"label": operator.label}}
        if "operator" in self.provenance:
            made = {key: self.provenance[key] for key in ("model", "operator")}
            now = {"model": point.fingerprint, "operator": fingerprint_operator(operator)}
        if changes := differences(made, now):
            raise StaleArtifact(
                "The landmarks were scored with something else.",
                given=("\n" + " " * 11).join(changes),
                accepted="the same model, factors and damping",
                fix="score the landmarks again",
            )


def nystroem(k_QJ: np.ndarray, k_JJ: np.ndarray, a_JN: np.ndarray) -> np.ndarray:
    """`k (K + e mean(diag K))^-1 A`, `[Q, N]`, in the format of `A`."""
    damped = k_JJ + RIDGE * np.diagonal(k_JJ).mean() * np.eye(len(k_JJ))
    return np.linalg.solve(damped.T, k_QJ.T.astype(np.float64)).T.astype(a_JN.dtype) @ a_JN


def open_landmarks(path: str | Path) -> Landmarks:
    """Scores in a folder as landmarks; StaleArtifact where they are unfinished or damaged."""
    return Landmarks(open_scores(path), Folder.open(within(Path(path), SHARD)).provenance)

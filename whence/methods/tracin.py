"""TracIn: what steps on a row did for the query while the model was trained (Pruthi et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from whence.engine.point import Point
from whence.errors import UsageError
from whence.methods.base import Place, assembled
from whence.models import load_model
from whence.operators import Identity
from whence.scoring.score import score_points
from whence.settings import Score
from whence.store.scores import Scores
from whence.tasks.base import Task
from whence.train.checkpoints import load_weights
from whence.train.record import read_training


def tracin(
    training: str | Path,
    task: Task,
    queries: Any,
    rows: Any,
    *,
    modules: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    settings: Score = Score(),
    rerun: bool = False,
) -> Scores:
    """Sum over the checkpoints of a training of learning rate times gradient dot product (TracInCP, section 3.2).

    `training` is a folder that `whence train` made. Values are nats by which one step of gradient descent on the row alone
    would have raised what was measured, added up over the checkpoints, and not divided by the number of rows.

    Raises UsageError where no checkpoint was kept, StaleArtifact.
    """
    record = read_training(training)
    if not record.checkpoints:
        raise UsageError(f"{training} has no checkpoints", fix="train again with --keep 3 or more")
    model, _ = load_model(record.model)
    last = Point(model, task, rows)
    names = list(last.cover(modules).sites)

    def added(place: Place) -> Scores:
        parts = []
        for checkpoint in record.checkpoints:
            load_weights(checkpoint.path, model)
            point = Point(model, task, rows)
            given = {"out": place(f"checkpoint-{checkpoint.step}"), "settings": settings}
            parts.append(checkpoint.learning_rate * score_points(point, point, queries, Identity(names), **given))
        return replace(sum(parts[1:], parts[0]).named("TracIn", "nats per step on the row"), n_train=1)

    rates = {str(checkpoint.step): checkpoint.learning_rate for checkpoint in record.checkpoints}
    return assembled("tracin", added, last, queries, settings, out=out, rerun=rerun, modules=names, rates=rates)

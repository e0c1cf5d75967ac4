"""UnTrac and UnTrac-Inv: unlearn, and see what is forgotten (Isonuma and Titov 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from torch import Tensor

from whence.engine.forward import losses_of, measured_of
from whence.engine.trials import trials
from whence.errors import UsageError
from whence.methods.base import Recipe, Request
from whence.scoring.results import measured
from whence.settings import Amount, Count, Positive, Section, setting
from whence.store.scores import Scores
from whence.train.unlearn import Unlearner


class Unlearned(Section):
    """How groups of rows are unlearned."""

    groups: Literal["auto", "source", "rows"] = setting(
        "auto", "What is unlearned at a time: a source or a single row; auto: sources, where the rows have several."
    )
    epochs: Count = setting(1, "Times that each row of a group is unlearned.")
    batch_size: Count = setting(1, "Rows per step.")
    learning_rate: Positive = setting(5e-5, "Learning rate of Adam.")
    seed: Amount = setting(0, "Seed of the order of the rows.")


class Inverted(Section):
    """How queries are unlearned."""

    steps: Count = setting(5, "Steps on each query.")
    learning_rate: Positive = setting(5e-5, "Learning rate of Adam.")


def untrac(request: Request, settings: Unlearned) -> Scores:
    """What is lost of the queries' measurements by unlearning a group of rows, in equal parts for its rows (section 3.1)."""
    asked, groups = request.asked, groups_of(request, settings.groups)
    student = Unlearner(request.point, request.names)
    before_Q = measured_of(student.after([], 0.0), asked)

    def trial(number: int) -> Tensor:
        steps = student.rows(groups[number], settings.epochs, settings.batch_size, settings.seed)
        return before_Q - measured_of(student.after(steps, settings.learning_rate), asked)

    raw = np.zeros((len(asked), len(request.point.examples)))
    for rows, lost_Q in zip(groups, _trials(request, len(groups), trial), strict=True):
        raw[:, rows] = lost_Q.numpy()[:, None] / len(rows)
    unit = str(measured(request.point)["unit"]).replace("per copy", "per row unlearned")
    return request.scores_of(raw, f"UnTrac, {len(groups)} groups", unit, measured=True)


def untrac_inv(request: Request, settings: Inverted) -> Scores:
    """What is lost of each row's log-likelihood by unlearning a query (section 3.2)."""
    student = Unlearner(request.point, request.names)
    before_N = losses_of(student.after([], 0.0))

    def trial(number: int) -> Tensor:
        steps = student.query(request.asked, number, settings.steps)
        return losses_of(student.after(steps, settings.learning_rate)) - before_N

    raw = _trials(request, len(request.asked), trial).numpy()
    return request.scores_of(raw, f"UnTrac-Inv, {settings.steps} steps", "nats of the row's loss", measured=True)


def groups_of(request: Request, groups: Literal["auto", "source", "rows"]) -> list[list[int]]:
    """The rows of each group. Raises UsageError where sources are asked for that the rows don't have."""
    examples = request.point.examples
    sources = {row: each.get("source") for row in examples.usable if isinstance(each := examples.rows[row], Mapping)}
    names = list(dict.fromkeys(sources.values()))
    if groups == "source" and names in ([], [None]):
        raise UsageError(
            "The rows have no source to be grouped by", fix='groups="rows", or name the column: --columns source=...'
        )
    if groups == "rows" or (groups == "auto" and len(names) < 2):
        return [[row] for row in examples.usable]
    return [[row for row, source in sources.items() if source == name] for name in names]


def _trials(request: Request, count: int, trial: Callable[[int], Tensor]) -> Tensor:
    made_from = request.point.provenance
    return trials(count, trial, "unlearning", made_from, out=request.place("unlearned"))


PAPER = "Isonuma and Titov 2024"

RECIPES = (
    Recipe(
        "untrac", "UnTrac", f"{PAPER}, section 3.1", untrac, Unlearned, whole=True, price="an epoch over the rows, backwards"
    ),
    Recipe(
        "untrac-inv",
        "UnTrac-Inv",
        f"{PAPER}, section 3.2",
        untrac_inv,
        Inverted,
        whole=True,
        price="a forward pass over the rows per query",
    ),
)

"""TracIn: what steps on a row did for the query while the model was trained (Pruthi et al. 2020)."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import add

from whence.methods.base import NoSettings, Recipe, Request
from whence.store.scores import Scores


def tracin(request: Request, settings: NoSettings) -> Scores:
    """Sum over the checkpoints of a training of learning rate times gradient dot product (TracInCP, section 3.2).

    Values are nats by which one step of gradient descent on the row alone would have raised what was measured, added up over
    the checkpoints, and not divided by the number of rows.
    """
    parts = (
        checkpoint.learning_rate * request.score(name=f"checkpoint-{checkpoint.step}", point=point)
        for checkpoint, point in request.checkpoints()
    )
    return replace(reduce(add, parts).named("TracIn", "nats per step on the row"), n_train=1)


RECIPES = (
    Recipe(
        "tracin",
        "TracIn",
        "Pruthi et al. 2020, section 3.2",
        tracin,
        needs=("training",),
        price="a pass over the rows per checkpoint",
    ),
)

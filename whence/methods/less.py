"""LESS: cosines of what a row's step with Adam would do and of the queries' gradients, over checkpoints (Xia et al. 2024)."""

from __future__ import annotations

from functools import reduce
from operator import add

import torch

from whence.gradients import dot
from whence.methods.adam import adam_metric
from whence.methods.base import Recipe, Request
from whence.methods.projected import Sides, cosines, norms, projected, shapes_of
from whence.operators.projection import random_projection
from whence.settings import AtLeastZero, setting
from whence.store.scores import Scores


class Less(Sides):
    """LESS."""

    epsilon: AtLeastZero = setting(1e-8, "Added to the root of Adam's second moments, as in training.")


def less(request: Request, settings: Less) -> Scores:
    """`sum_t eta_t cos(P grad m(query), P Gamma(row))` at the weights of each checkpoint (Xia et al. 2024, definition 3.1).

    `Gamma` is the row's gradient over the root of the second moments that the optimizer had there, `eta_t` the mean learning
    rate since the checkpoint before. The first moment, the same for all rows, is not kept by checkpoints and left out; so is
    the row's own part in the second.
    """
    projection = random_projection(shapes_of(request), settings.dim, request.settings.seed)
    parts, before = [], 0
    assert request.training is not None
    for checkpoint, point in request.checkpoints():
        rate, before = float(request.training.learning_rates[before : checkpoint.step].mean()), checkpoint.step
        metric = adam_metric(point, request.names, checkpoint, settings.epsilon)
        updates = projection @ metric.apply(torch.reciprocal, "inverse")
        small = projected(request, projection, f"checkpoint-{checkpoint.step}", point=point, of_rows=updates)
        queries = small.queries
        raw_QN = small.columns(lambda rows, queries=queries: dot(queries, rows))
        cosines_QN = cosines(raw_QN, norms(queries), small.columns(norms, "norms"))
        parts.append(rate * small.scores(cosines_QN, "cosine of Adam's updates", "cosine", n_train=1))
    return reduce(add, parts).named("LESS", "learning rate x cosine")


PRICE = "a pass over the rows at each checkpoint, dim x dim numbers kept of each row and module"

RECIPES = (Recipe("less", "LESS", "Xia et al. 2024, definition 3.1", less, Less, needs=("training",), whole=True, price=PRICE),)

"""Influence by factors that `whence fit` makes: damped inverses of block-diagonal curvatures in Kronecker-factored bases."""

from __future__ import annotations

import functools

from whence.fitting.methods import METHODS
from whence.methods.base import Recipe, Request
from whence.methods.damping import Damped, damped_inverse
from whence.store.scores import Scores


def factored(request: Request, settings: Damped, *, method: str) -> Scores:
    """`grad m(query)^T (G + damping)^-1 grad log p(row)`, `G` being the factors (Grosse et al. 2023, eq. 18 to 22)."""
    return request.score(damped_inverse(request, settings, request.curvature(method)))


RECIPES = tuple(
    Recipe(
        name,
        title,
        METHODS[name].source,
        functools.partial(factored, method=name),
        Damped,
        uses=("factors", "training"),
        price="a fit, and a pass over the rows",
    )
    for name, title in (("ekfac", "EK-FAC"), ("kfac", "K-FAC"), ("shampoo", "Shampoo"), ("diagonal", "Diagonal"))
)

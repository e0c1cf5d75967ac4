"""Influence by factors that `whence fit` makes: damped inverses of block-diagonal curvatures in Kronecker-factored bases."""

from __future__ import annotations

import functools

from whence.fitting.methods import METHODS
from whence.methods.base import Recipe, Request
from whence.methods.damping import Damped, damping_of_training
from whence.store.scores import Scores


def factored(request: Request, settings: Damped, *, method: str) -> Scores:
    """`grad m(query)^T (G + damping)^-1 grad log p(row)`, `G` being the factors (Grosse et al. 2023, eq. 18 to 22).

    A number as damping is in units of each module's own mean eigenvalue. The damping of a training with Adam, a number for each
    weight, is taken on the diagonal of the factors' bases (`BlockDiagonal.plus`): exact for "diagonal" only.
    """
    curvature = request.curvature(method)
    if settings.of_training:
        return request.score(damping_of_training(request).inverse(curvature))
    return request.score(curvature.inverse(settings.relative, absolute=settings.absolute_damping))


RECIPES = tuple(
    Recipe(name, title, METHODS[name].source, functools.partial(factored, method=name), Damped, uses=("factors", "training"))
    for name, title in (("ekfac", "EK-FAC"), ("kfac", "K-FAC"), ("shampoo", "Shampoo"), ("diagonal", "Diagonal"))
)

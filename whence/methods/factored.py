"""Influence by factors that `whence fit` makes: damped inverses of block-diagonal curvatures in Kronecker-factored bases."""

from __future__ import annotations

import functools

from whence.fitting.methods import METHODS
from whence.methods.base import Recipe, Request
from whence.settings import DAMPING, AtLeastZero, Section, setting
from whence.store.scores import Scores


class Damped(Section):
    """How much of the identity is added to a curvature before it is inverted."""

    damping: AtLeastZero = setting(0.1, DAMPING)
    absolute_damping: AtLeastZero | None = setting(None, "The same damping for all modules, instead of `damping`.")


def factored(request: Request, settings: Damped, *, method: str) -> Scores:
    """`grad m(query)^T (G + damping)^-1 grad log p(row)`, `G` being the factors (Grosse et al. 2023, eq. 18 to 22)."""
    curvature = request.curvature(method)
    return request.score(curvature.inverse(settings.damping, absolute=settings.absolute_damping))


RECIPES = tuple(
    Recipe(name, title, METHODS[name].source, functools.partial(factored, method=name), Damped, uses=("factors",))
    for name, title in (("ekfac", "EK-FAC"), ("kfac", "K-FAC"), ("shampoo", "Shampoo"), ("diagonal", "Diagonal"))
)

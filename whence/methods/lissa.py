"""LiSSA: the inverse of a damped curvature matrix as a series of products with a few rows each, nothing formed."""

from __future__ import annotations

from typing import Literal

from whence.methods.base import Recipe, Request
from whence.methods.stochastic import Steps, stochastic_inverse
from whence.settings import Count, setting
from whence.store.scores import Scores


class Series(Steps):
    """How the series is added up."""

    repeats: Count = setting(1, "Series of other rows, of which the mean is taken.")
    near: Literal["none", "ekfac"] = setting("none", "Preconditioner: nothing (the published form), or damped EK-FAC.")


def lissa(request: Request, settings: Series) -> Scores:
    """`h <- v + h - (G_B + lambda) h / sigma`, then `h / sigma` (Koh & Liang 2017, section 3), for all queries at once."""
    how = {"repeats": settings.repeats, "short": True}
    return request.score(stochastic_inverse(request, settings, "LiSSA", settings.near == "ekfac", **how))


SOURCE = "Agarwal et al. 2017; Koh & Liang 2017, section 3"

PRICE = "steps of a few rows for each query, and two passes over the rows"

RECIPES = (Recipe("lissa", "LiSSA", SOURCE, lissa, Series, uses=("factors", "training"), price=PRICE),)

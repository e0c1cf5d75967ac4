"""ASTRA: what EK-FAC gives, refined by steps that read a few rows each."""

from __future__ import annotations

from whence.methods.base import Recipe, Request
from whence.methods.stochastic import Steps, stochastic_inverse
from whence.settings import AtLeastZero, Count, Positive, setting
from whence.store.scores import Scores


class Refined(Steps):
    """How EK-FAC's solution is refined."""

    depth: Count = setting(600, "Maximum steps.")
    safety: Positive = setting(0.7, "Scale in units of the largest eigenvalue that a few batches have; above a half.")
    averaging: AtLeastZero = setting(8.0, "Iterate t counts as t to this power in the mean that is the solution.")


def astra(request: Request, settings: Refined) -> Scores:
    """`x <- x + (EK-FAC + lambda)^-1 (v - (G_B + lambda) x) / sigma` from EK-FAC's solution, averaged over the steps."""
    return request.score(stochastic_inverse(request, settings, "ASTRA", True, weight=settings.averaging))


SOURCE = "Wang et al. 2025, the preconditioned iteration of section 3"

PRICE = "steps of a few rows for each query, and two passes over the rows"

RECIPES = (Recipe("astra", "ASTRA", SOURCE, astra, Refined, uses=("factors", "training"), price=PRICE),)

"""ASTRA: what EK-FAC gives, refined by steps that read a few rows each."""

from __future__ import annotations

from whence.methods.base import Recipe, Request
from whence.methods.stochastic import Steps, stochastic_inverse
from whence.settings import AtLeastZero, setting
from whence.store.scores import Scores


class Refined(Steps):
    """How EK-FAC's solution is refined."""

    averaging: AtLeastZero = setting(3.0, "Iterate t counts as t to this power in the mean that is the solution.")


def astra(request: Request, settings: Refined) -> Scores:
    """`x <- x + (EK-FAC + lambda)^-1 (v - (G_B + lambda) x) / sigma`, from EK-FAC's solution, averaged over the steps.

    Wang et al. (2025), equation 8.
    """
    return request.score(stochastic_inverse(request, settings, "ASTRA", True, weight=settings.averaging))


RECIPES = (Recipe("astra", "ASTRA", "Wang et al. 2025, with EK-FAC near it", astra, Refined, uses=("factors", "training")),)

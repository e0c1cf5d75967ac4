"""Gradients without a curvature, and what tells whether a ranking is more than the size of its rows: baselines and controls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from whence.methods.base import NoSettings, Recipe, Request
from whence.methods.damping import Damped, damped_inverse
from whence.operators import Identity
from whence.settings import Amount, Section, setting
from whence.store.scores import Scores

CONTROL = "a control: it does not read the query"


class Relative(Damped):
    """What a row's influence is divided by."""

    norm: Literal["loss", "weights"] = setting(
        "loss", "What the row moves: its own loss (l-RelatIF) or the weights (theta-RelatIF, one pass more)."
    )


class Seeded(Section):
    """Of numbers that are drawn."""

    seed: Amount = setting(0, "Seed of the numbers.")


def gradient_dot(request: Request, settings: NoSettings) -> Scores:
    """`<grad m(query), grad log p(row)>`: what a step of gradient descent on the row alone raises, at a learning rate of 1."""
    scores = request.score()
    return replace(scores.named("gradient dot product", scores.unit.replace("per copy", "per step on the row")), n_train=1)


def gradient_cosine(request: Request, settings: NoSettings) -> Scores:
    """The same, divided by the norms of both gradients."""
    return request.score(norms=("cosine",)).normalised("cosine").named("cosine of gradients")


def relatif(request: Request, settings: Relative) -> Scores:
    """Influence relative to what the row moves whatever is asked (Barshan et al. 2020, section 4), `H` being EK-FAC.

    `g_q^T H^-1 g_z / sqrt(g_z^T H^-1 g_z)` (l-RelatIF), or `g_q^T H^-1 g_z / |H^-1 g_z|` (theta-RelatIF).
    """
    inverse = damped_inverse(request, settings, request.curvature())
    if settings.norm == "loss":
        return request.score(inverse, norms=("relatif",)).normalised("relatif")
    scores = request.score(inverse)
    moved = replace(scores, norms={"self": request.on_itself(inverse @ inverse).raw[0]})
    return moved.normalised("relatif")


def self_influence(request: Request, settings: Damped) -> Scores:
    """`grad log p(row)^T H^-1 grad log p(row)`, `H` being EK-FAC: a copy of the row's effect on itself, whatever is asked."""
    inverse = damped_inverse(request, settings, request.curvature())
    own = request.on_itself(inverse)
    unit = own.unit.replace(" per copy", " of the row itself per copy")
    return replace(
        request.scores_of(_for_all(request, own.raw), f"influence on itself, {inverse.label}", unit), n_train=own.n_train
    )


def gradient_norm(request: Request, settings: NoSettings) -> Scores:
    """`|grad log p(row)|`, whatever is asked: what ranks no better looks at the rows alone."""
    squares = request.on_itself(Identity(request.names)).raw
    return request.scores_of(_for_all(request, np.sqrt(squares)), "norm of the row's gradient", "gradient norm")


def random(request: Request, settings: Seeded) -> Scores:
    """Independent draws of a standard normal distribution: what ranks no better knows nothing."""
    shape = len(request.asked), len(request.point.examples)
    drawn = np.random.default_rng(settings.seed).standard_normal(shape)
    return request.scores_of(drawn, f"random numbers, seed {settings.seed}", "random number")


def _for_all(request: Request, row_1N: np.ndarray) -> np.ndarray:
    """The same numbers for every query."""
    return np.repeat(row_1N, len(request.asked), 0)


FITTED: dict[str, Any] = {"uses": ("factors", "training"), "price": "factors, then a pass over the rows", "whole": True}

RECIPES = (
    Recipe("gradient-dot", "Gradient dot product", "Charpiat et al. 2019, eq. 2; Pruthi et al. 2020", gradient_dot),
    Recipe("gradient-cosine", "Gradient cosine", "Charpiat et al. 2019, eq. 3", gradient_cosine, whole=True),
    Recipe("gradient-norm", "Gradient norm", CONTROL, gradient_norm, whole=True),
    Recipe("random", "Random numbers", CONTROL, random, Seeded, whole=True, price="nothing"),
    Recipe("relatif", "RelatIF", "Barshan et al. 2020, section 4", relatif, Relative, **FITTED),
    Recipe("self-influence", "Self-influence", CONTROL, self_influence, Damped, **FITTED),
)

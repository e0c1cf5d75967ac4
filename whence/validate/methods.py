"""The methods that checks compare, fitted to a setting's model and scored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from whence.engine.point import Point
from whence.errors import UsageError
from whence.fitting import Curvature, fit_at
from whence.scoring.score import score_points
from whence.settings import Fit, Score
from whence.validate.settings import Setting

NAMES = {
    "ekfac": "EK-FAC",
    "shampoo": "Shampoo",
    "kfac": "K-FAC",
    "diagonal": "diagonal",
    "identity": "gradient dot",
    "cosine": "gradient cosine",
}
"""Methods of the engine; Shampoo is its eigenbasis with eigenvalues corrected as EK-FAC's are."""

EXACT = "exact damped GGN"

EVERYTHING: dict[str, Any] = {"examples": "all", "eigenvalue_examples": "all", "draws": 8}
"""The engine sees what the exact curvature sees: all rows, and nearly all labels."""


def scored(
    setting: Setting, model: nn.Module, methods: Sequence[str], seed: int, **fitting: Any
) -> dict[str, Callable[..., np.ndarray]]:
    """Fit every method, with the settings `fitting`: by name, its scores `[Q, N]` as a function of the damping.

    The damping is given as to `Curvature.inverse`; gradient dot and cosine have none. Scores are in nats per copy, cosines
    have no unit.
    """
    found: dict[str, Callable[..., np.ndarray]] = {}
    point, settings = Point(model, setting.task, setting.train), Fit().changed(modules=setting.modules, seed=seed, **fitting)
    for method in methods:
        curvature = fit_at(point, settings.changed(method="identity" if method == "cosine" else method))
        found[NAMES[method]] = functools.partial(_scores, setting, point, curvature, method)
    return found


def _scores(
    setting: Setting, point: Point, curvature: Curvature, method: str, damping: float = 0.1, absolute: float | None = None
) -> np.ndarray:
    plain, norms = method in ("identity", "cosine"), ("cosine",) if method == "cosine" else ()
    operator = curvature.inverse(0.0) if plain else curvature.inverse(damping, absolute=absolute)
    scores = score_points(point, point, setting.queries, operator, Score().changed(norms=norms))
    return (scores.normalised("cosine") if norms else scores).values


def refuse_unknown(methods: Sequence[str]) -> None:
    """Raise UsageError for an unknown method."""
    if unknown := [name for name in methods if name not in NAMES]:
        raise UsageError(f"There is no method {unknown[0]!r} to compare", accepted=", ".join(NAMES))

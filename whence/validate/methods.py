"""The methods that checks compare, fitted to a setting's model and scored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from whence.errors import UsageError
from whence.fitting import Curvature, fit
from whence.scoring import score
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
    for method in methods:
        kind = "identity" if method == "cosine" else method
        curvature = fit(model, setting.task, setting.train, method=kind, modules=setting.modules, seed=seed, **fitting)
        found[NAMES[method]] = functools.partial(_scores, setting, model, curvature, method)
    return found


def _scores(
    setting: Setting, model: nn.Module, curvature: Curvature, method: str, damping: float = 0.1, absolute: float | None = None
) -> np.ndarray:
    plain, norms = method in ("identity", "cosine"), ("cosine",) if method == "cosine" else ()
    operator = curvature.inverse(0.0) if plain else curvature.inverse(damping, absolute=absolute)
    scores = score(model, setting.task, setting.queries, setting.train, operator, norms=norms)
    return (scores.normalised("cosine") if norms else scores).values


def refuse_unknown(methods: Sequence[str]) -> None:
    """Raise UsageError for an unknown method."""
    if unknown := [name for name in methods if name not in NAMES]:
        raise UsageError(f"There is no method {unknown[0]!r} to compare", accepted=", ".join(NAMES))

"""What is refused before scoring, and after it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from whence.errors import DegenerateScores, NumericalError, UsageError, WhenceWarning
from whence.operators import Operator
from whence.settings import Score


def check_operator(operator: object) -> None:
    """Raise UsageError for what is not an operator, such as a curvature of which the inverse was forgotten."""
    if not isinstance(operator, Operator):
        curvature = hasattr(operator, "inverse")
        raise UsageError(
            "Queries are multiplied with an operator, and this is a fitted curvature."
            if curvature
            else "This is not an operator.",
            given=f"a {type(operator).__name__}",
            accepted="curvature.inverse(damping=0.1), or another operator of whence.operators",
            fix="put .inverse(damping=0.1) after it" if curvature else "curvature.inverse(damping=0.1)",
        )


def check_choices(settings: Score, operator: Operator) -> None:
    """Raise UsageError for settings that don't go together."""
    if "relatif" in settings.norms and not operator.blockwise:
        raise UsageError(
            "The influence of rows on themselves needs an operator that acts on each module by itself",
            given=operator.label,
            accepted="blockwise operators, such as curvature.inverse(damping=0.1)",
        )
    if unknown := [kind for kind in settings.aggregate if kind not in ("queries", "examples")]:
        raise UsageError(f"aggregate={unknown[0]!r} is not known", accepted="queries, examples, or both")
    if "examples" in settings.aggregate and (settings.per != "example" or settings.rescore):
        raise UsageError("Scores added up over the examples have no parts", accepted='per="example", rescore=0')
    if settings.rescore and (settings.per != "example" or settings.aggregate):
        raise UsageError("rescore works on scores per example and query", accepted='per="example", no aggregate')


def check_scores(raw: np.ndarray, ids: Sequence[str]) -> None:
    """Raise where the scores are not finite or say nothing."""
    if not np.isfinite(raw).all():
        bad = np.flatnonzero(~np.isfinite(raw).all(0))
        raise NumericalError(
            f"{len(bad)} of {raw.shape[1]} examples have a score that is not finite",
            given=", ".join(str(ids[index]) for index in bad[:5]) if raw.shape[1] == len(ids) else "",
            fix="look at these rows (whence data preview), or score in float32",
        )
    constant = (raw == raw[:, :1]).all(1)
    if raw.shape[1] < 2 or not constant.any() or len({name.partition("#")[0] for name in ids}) < 2:
        return
    if constant.all():
        raise DegenerateScores(
            "All scores are identical",
            given=f"{raw.shape[0]} queries x {raw.shape[1]} examples, every score {raw.flat[0]:g}",
            accepted="queries whose gradient reaches the tracked modules",
            fix="check that the loss depends on them (--modules all), that the query has tokens in the loss "
            "(whence data preview), and that gradients don't underflow (float32)",
        )
    warnings.warn(f"{int(constant.sum())} queries score every example the same [WHENCE-15]", WhenceWarning, stacklevel=3)

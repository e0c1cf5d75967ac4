"""The factors to look at: every module's health, and one module's eigenvalues as curves and as a map."""

from __future__ import annotations

from typing import Any

import numpy as np

from whence.fitting import Curvature
from whence.fitting.health import health
from whence.plots import factors as plots
from whence.serve.lacking import NotThere
from whence.store.plain import plain

CELLS = 48
"""Rows and columns of a map that a page shows as a table."""

POINTS = 300
"""Of a curve."""


def overview(curvature: Curvature, damping: float) -> dict[str, Any]:
    """All modules in numbers."""
    modules = [entry.as_json() for entry in health(curvature, damping)]
    return {"about": plain(curvature.about), "damping": damping, "modules": modules}


def module(curvature: Curvature, name: str, damping: float) -> dict[str, Any]:
    """One module's eigenvalues. Raises NotThere where there is none of that name, NumericalError where they are not finite."""
    if name not in curvature.blocks:
        raise NotThere(f"The factors have no module {name!r}.", accepted=", ".join(list(curvature.blocks)[:10]))
    entry = next(entry for entry in health(curvature, damping) if entry.module == name)
    lam_OI, sides = curvature.blocks[name].lam_OI, curvature.sides.get(name)
    values = plots.spectrum(lam_OI, entry)
    shares, marks = plots.cumulative(values.values)
    counted, drawn = plots.distribution(values), plots.lambda_map(lam_OI, values, sides)
    cells = plots.block_means(drawn.cells, CELLS)
    coloured = {"low": drawn.low, "high": drawn.high, "order": drawn.order, "block": _block(drawn.shape, cells)}
    document = {
        "module": name,
        "shape": entry.shape,
        "d": entry.d,
        "effective_rank": entry.effective_rank,
        "spectrum": _curve(values.values),
        "zero": values.zero,
        "negative": values.negative,
        "cumulative": {**_curve(shares, "shares"), "marks": {str(share): count for share, count in marks.items()}},
        "distribution": {"edges": counted.edges, "counts": counted.counts},
        "sides": None,
        "map": {"cells": cells, **coloured},
    }
    if sides:
        both = {"inputs": sides.in_I, "outputs": sides.out_O}
        document["sides"] = {key: _curve(np.sort(side.double().cpu().numpy())[::-1]) for key, side in both.items()}
    return plain(document)


def _curve(descending: np.ndarray, name: str = "values") -> dict[str, Any]:
    """Some of many values, close together at the beginning."""
    at = np.arange(len(descending))
    if len(at) > POINTS:
        at = np.unique(np.concatenate([np.arange(20), np.geomspace(20, len(at), POINTS - 20).astype(int) - 1]))
    return {"ranks": at + 1, name: descending[at]}


def _block(shape: tuple[int, int], cells: np.ndarray) -> list[int]:
    return [-(-whole // drawn) for whole, drawn in zip(shape, cells.shape, strict=True)]

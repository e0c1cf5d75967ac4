"""How well two estimates of the effects of the same rows on the same queries agree, query by query."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """Correlations over rows, averaged over queries, with the standard errors of the averages."""

    pearson: float
    pearson_se: float
    spearman: float
    spearman_se: float
    queries: int
    """That have a correlation: neither side is constant."""

    def columns(self, prefix: str = "") -> dict[str, float]:
        """The numbers by name, for tables."""
        names = ("pearson", "pearson_se", "spearman", "spearman_se")
        return {f"{prefix}{name}": getattr(self, name) for name in names}


def agree(found_QR: np.ndarray, truth_QR: np.ndarray) -> Agreement:
    """Pearson's and Spearman's correlation over rows `R` for each query, mean and standard error over queries `Q`."""
    from scipy.stats import rankdata

    pearson = correlations(found_QR, truth_QR)
    spearman = correlations(rankdata(found_QR, axis=1), rankdata(truth_QR, axis=1))
    known = pearson[~np.isnan(pearson)]
    return Agreement(*_mean(pearson), *_mean(spearman), len(known))


def correlations(found_QR: np.ndarray, truth_QR: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each query, `[Q]`; NaN where either side is constant."""
    a, b = found_QR - found_QR.mean(1, keepdims=True), truth_QR - truth_QR.mean(1, keepdims=True)
    sizes = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), sizes, out=np.full(len(a), math.nan), where=sizes > 0)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a table as Markdown."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([shown(row.get(name)) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shown(value: Any) -> str:
    """A number in four digits, anything else as it is."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return "" if value is None else str(value)


def _mean(values: np.ndarray) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return math.nan, math.nan
    return float(known.mean()), float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan

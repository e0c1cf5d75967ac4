"""95 % intervals of shares, of means, and of differences between two that were measured on the same questions."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z = 1.959963984540054
"""Of a normal variable: 95 % are closer to its mean, in standard deviations."""

RESAMPLES = 4000
BLOCK = 1_000_000
"""Numbers drawn at a time."""


@dataclass(frozen=True)
class Interval:
    """An estimate from `n` measurements, and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def share(successes: int, n: int) -> Interval:
    """Share of successes, with Wilson's (1927) score interval, which is right for small `n` and shares near 0 and 1."""
    p, z2 = successes / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, min(middle - half, p), max(middle + half, p), n)


def paired_shares(before: np.ndarray, after: np.ndarray) -> tuple[Interval, float]:
    """Difference of two shares of the same `[N]` questions, after minus before, and the p-value of no difference.

    The interval is the adjusted Wald of Bonett & Price (2012), the test McNemar's, exact (binomial over the questions that
    only one of both got right).
    """
    from scipy.stats import binomtest

    n, gained, lost = len(before), int((after & ~before).sum()), int((before & ~after).sum())
    p_gained, p_lost = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    middle = p_gained - p_lost
    half = Z * math.sqrt((p_gained + p_lost - middle**2) / (n + 2))
    p_value = float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
    return Interval((gained - lost) / n, max(middle - half, -1.0), min(middle + half, 1.0), n), p_value


def bootstrap(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of `[N]` values with its percentile bootstrap interval (Efron & Tibshirani 1993); NaNs are left out.

    Fewer than two values have no interval: its ends are NaN.
    """
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    if len(values) == 1:
        return Interval(float(values[0]), math.nan, math.nan, 1)
    draw = np.random.default_rng(seed)
    at_once = max(1, BLOCK // len(values))
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    means = [values[draw.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), len(values))

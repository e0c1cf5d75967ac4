"""Correlations and 95 % intervals: arrays in, numbers out.

`Q` queries, `K` subsets or rows that a correlation is over, `R` resamples. Whatever is measured on the same queries and subsets
is resampled with the same draws, so that differences between methods are paired.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

Z = 1.959963984540054
"""Of a normal variable: 95 % are closer to its mean, in standard deviations."""

RESAMPLES = 4000
"""Of a mean."""

RANK_RESAMPLES = 1000
"""Of a rank correlation, or of groups: enough for the ends of a 95 % interval to a twentieth of its width."""

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

    def columns(self, name: str) -> dict[str, float]:
        """The estimate and its ends as columns `name`, `name_low` and `name_high` of a table."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


# correlations


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation along the last axis; NaN where either side is constant."""
    a, b = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    return _ratio((a * b).sum(-1), np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), math.nan)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis; 0 where either side is constant."""
    a, b = ranks(x), ranks(y)
    # sums of squared ranks are exact, so that a ranking correlates with itself to exactly 1
    return _ratio((a * b).sum(-1), np.sqrt((a * a).sum(-1) * (b * b).sum(-1)), 0.0)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, ties sharing their mean, centred: the mean is 0."""
    from scipy.stats import rankdata

    return rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2


def _ratio(over: np.ndarray, under: np.ndarray, otherwise: float) -> np.ndarray:
    return np.where(under > 0, over / np.where(under > 0, under, 1), otherwise)


class Agreement(NamedTuple):
    """Correlations over rows, averaged over queries, with the standard errors of the averages."""

    pearson: float
    pearson_se: float
    spearman: float
    spearman_se: float


def agree(x_QK: np.ndarray, y_QK: np.ndarray) -> Agreement:
    """Pearson's and Spearman's correlation of each query: mean and standard error over those where neither side is constant."""
    return Agreement(*mean_error(pearson(x_QK, y_QK)), *mean_error(pearson(ranks(x_QK), ranks(y_QK))))


def best_rank(scores: np.ndarray, sources: Sequence[int]) -> int:
    """The rank of the best source among the rows `[N]` that are none; ties count against it: not telling is no merit."""
    best = scores[list(sources)].max()
    return int((np.delete(scores, list(sources)) >= best).sum()) + 1


def top_overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Share of the `k` highest of `a [N]` that are among the `k` highest of `b`."""
    return len(set(np.argsort(-a, kind="stable")[:k]) & set(np.argsort(-b, kind="stable")[:k])) / k


def spread(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly apart."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


# intervals


def mean_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of the values that are numbers, and its standard error; NaN where there are too few."""
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return math.nan, math.nan
    return float(known.mean()), float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan


def student(values: np.ndarray, lowest: float = -math.inf, highest: float = math.inf) -> Interval:
    """Mean with its interval by Student's t, cut off at `lowest` and `highest`; fewer than two values have no interval."""
    from scipy.stats import t

    count, mean = len(values), float(values.mean())
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = float(t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count))
    return Interval(mean, max(mean - half, lowest), min(mean + half, highest), count)


def wilson(successes: int, n: int) -> Interval:
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
    if len(values) < 2:
        return Interval(float(values.mean()) if len(values) else math.nan, math.nan, math.nan, len(values))
    draw = np.random.default_rng(seed)
    at_once = max(1, BLOCK // len(values))
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    means = [values[draw.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    return Interval(float(values.mean()), *ends(np.concatenate(means)), len(values))


def bootstrap_groups(groups: Sequence[np.ndarray], seed: int = 0) -> Interval:
    """Mean of all values of the groups, and its interval when groups are drawn again, and values within each of them."""
    every = np.concatenate(groups)
    if len(every) < 2:
        return Interval(float(every.mean()), math.nan, math.nan, len(every))
    draw = np.random.default_rng(seed)
    drawn_RG = draw.integers(len(groups), size=(RANK_RESAMPLES, len(groups)))
    sums, counts = np.zeros(RANK_RESAMPLES), np.zeros(RANK_RESAMPLES)
    for group, own in enumerate(groups):
        for slot in range(len(groups)):
            here = drawn_RG[:, slot] == group
            sums[here] += own[draw.integers(len(own), size=(int(here.sum()), len(own)))].sum(1)
            counts[here] += len(own)
    return Interval(float(every.mean()), *ends(sums / counts), len(every))


def resampled_spearman(x_QK: np.ndarray, y_QK: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mean over queries of Spearman's correlation over subsets in each resample of both, `[R]`.

    A subset that is drawn twice counts twice in the correlation of the ranks, which are those among all subsets.
    """
    return resampled_pearson(ranks(x_QK), ranks(y_QK), seed)


def resampled_pearson(x_QK: np.ndarray, y_QK: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mean over queries of Pearson's correlation over subsets in each resample of both, `[R]`; 0 where either is constant."""
    queries, subsets = x_QK.shape
    x, y = x_QK - x_QK.mean(-1, keepdims=True), y_QK - y_QK.mean(-1, keepdims=True)
    drawn_RK, drawn_RQ = _counts(subsets, seed) / subsets, _counts(queries, seed + 1) / queries
    mean_x, mean_y = drawn_RK @ x.T, drawn_RK @ y.T
    covariance = drawn_RK @ (x * y).T - mean_x * mean_y
    variance = (drawn_RK @ (x * x).T - mean_x**2) * (drawn_RK @ (y * y).T - mean_y**2)
    correlation_RQ = _ratio(covariance, np.sqrt(np.maximum(variance, 0)), 0.0)
    return (correlation_RQ * drawn_RQ).sum(1)


@functools.lru_cache(maxsize=8)
def _counts(size: int, seed: int) -> np.ndarray:
    """How often each of `size` things is drawn in each resample, `[R, size]`."""
    draw = np.random.default_rng([seed, size])
    return draw.multinomial(size, np.full(size, 1 / size), size=RANK_RESAMPLES).astype(np.float64)


def ends(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled numbers."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)

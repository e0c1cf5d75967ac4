"""Intervals of rank correlations averaged over queries, by resampling both queries and subsets.

`Q` queries, `K` subsets, `R` resamples. Whatever is measured on the same queries and subsets is resampled with the same
draws, so that differences between methods are paired.
"""

from __future__ import annotations

import functools

import numpy as np

RESAMPLES = 1000
"""Enough for the ends of a 95 % interval to a twentieth of its width."""


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, ties sharing their mean, centred: the mean is 0."""
    from scipy.stats import rankdata

    return rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis; 0 where one of both is constant."""
    return _pearson(ranks(x), ranks(y))


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.where(scale > 0, (x * y).sum(-1) / np.where(scale > 0, scale, 1), 0.0)


@functools.lru_cache(maxsize=8)
def counts(size: int, seed: int) -> np.ndarray:
    """How often each of `size` things is drawn in each resample, `[R, size]`."""
    draw = np.random.default_rng([seed, size])
    return draw.multinomial(size, np.full(size, 1 / size), size=RESAMPLES).astype(np.float64)


def resampled_spearman(x_QK: np.ndarray, y_QK: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mean over queries of Spearman's correlation over subsets in each resample of both, `[R]`.

    A subset that is drawn twice counts twice in the correlation of the ranks, which are those among all subsets.
    """
    queries, subsets = x_QK.shape
    x, y = ranks(x_QK), ranks(y_QK)
    drawn_RK, drawn_RQ = counts(subsets, seed) / subsets, counts(queries, seed + 1) / queries
    mean_x, mean_y = drawn_RK @ x.T, drawn_RK @ y.T
    covariance = drawn_RK @ (x * y).T - mean_x * mean_y
    variance = (drawn_RK @ (x * x).T - mean_x**2) * (drawn_RK @ (y * y).T - mean_y**2)
    correlation_RQ = np.where(variance > 0, covariance / np.sqrt(np.where(variance > 0, variance, 1)), 0.0)
    return (correlation_RQ * drawn_RQ).sum(1)


def ends(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled numbers."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)

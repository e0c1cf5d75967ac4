"""What a random sample of the rows that were left out says about how many of the best rows were left out.

`S` rows were chosen and looked at exactly; the rest was sampled at random, without replacement, within each of two strata
(the second may be empty). Arrays in, numbers out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
"""Of a bound, one-sided."""


class Stratum(NamedTuple):
    """A part of the rest, and how many of its rows were drawn."""

    size: int
    drawn: int


def recall_bound(
    chosen_S: np.ndarray, drawn: Sequence[np.ndarray], strata: Sequence[Stratum], k: int, confidence: float = CONFIDENCE
) -> float:
    """A lower confidence bound on recall@k: the share of the `k` highest of all rows that are among the chosen.

    `chosen_S` are the exact scores of the chosen, `drawn` those of the sample of each stratum. The chosen row of rank `j`
    among the chosen is among the best `k` of all if at most `k - j` rows of the rest reach its score. That more do is tested
    by `p_value`; the highest `j` at which it is rejected is certified. The more rows `j` counts the harder it is to certify,
    so that all `j` together err no more often than one.
    """
    ranked = np.sort(chosen_S)[::-1][:k]
    low, high = 0, len(ranked)  # certified, and the highest that can be
    while low < high:
        j = (low + high + 1) // 2
        hits = [int((scores >= ranked[j - 1]).sum()) for scores in drawn]
        if p_value(hits, strata, k - j + 1) <= 1 - confidence:
            low = j
        else:
            high = j - 1
    return low / k


def best_bound(strata: Sequence[Stratum], k: int, confidence: float = CONFIDENCE) -> float:
    """What `recall_bound` certifies where the sample holds no row that was missed: of a perfect choice, with this sample."""
    return recall_bound(np.zeros(k), [np.full(stratum.drawn, -1.0) for stratum in strata], strata, k, confidence)


def p_value(hits: Sequence[int], strata: Sequence[Stratum], missed: int) -> float:
    """The probability of so few hits if the rest holds `missed` rows or more that count as one, however they are spread.

    The statistic is the estimate of how many there are, `sum_h N_h / n_h x_h`, with `x_h` hypergeometric; of all ways to
    spread `missed` rows over the strata the likeliest counts (Wendell & Schmee 1996, exact inference for proportions from a
    stratified finite population).
    """
    if missed > sum(stratum.size for stratum in strata):
        return 0.0
    full = [(x, stratum) for x, stratum in zip(hits, strata, strict=True) if stratum.size]
    (x, first), (y, second) = full if len(full) == 2 else (*full, (0, Stratum(0, 0)))
    a, b = first.size * max(second.drawn, 1), max(second.size, 1) * first.drawn  # both weights times both samples: integers
    most = min((a * x + b * y) // a, missed), min((a * x + b * y) // b, missed)
    first_MX, second_MX = (_hypergeometric(each, missed, x) for each, x in zip((first, second), most, strict=True))
    left_X = (a * x + b * y - a * np.arange(most[0] + 1)) // b
    within_MX = np.cumsum(second_MX, axis=1)[::-1, np.minimum(left_X, most[1])]  # of `missed - m` rows in the second
    return float((first_MX * within_MX).sum(1).max())


def _hypergeometric(stratum: Stratum, missed: int, most: int) -> np.ndarray:
    """Probability of `x` hits where `m` of the stratum's rows count as one, `[m, x]`; zeros where it has not so many rows."""
    from scipy.special import betaln

    def log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
        possible = (k >= 0) & (k <= n)
        n, k = np.where(possible, n, 0), np.where(possible, k, 0)
        return np.where(possible, -np.log1p(n) - betaln(n - k + 1, k + 1), -np.inf)

    m, x = np.arange(missed + 1)[:, None], np.arange(most + 1)[None]
    size, drawn = np.array(stratum.size), np.array(stratum.drawn)
    found = log_choose(m, x) + log_choose(size - m, drawn - x) - log_choose(size, drawn)
    return np.where(m <= size, np.exp(found), 0.0)

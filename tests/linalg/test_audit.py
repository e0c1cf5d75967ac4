"""Bounds on recall are those of counting every sample that could have been drawn, and err as seldom as they say."""

import itertools

import numpy as np
import pytest

from whence.linalg.audit import Stratum, best_bound, p_value, recall_bound


def counted(hits, strata, missed):
    """The p-value by counting: every spread of the missed rows, every pair of samples."""
    statistic = sum(x * stratum.size / stratum.drawn for x, stratum in zip(hits, strata, strict=True))
    found = 0.0
    for first in range(missed + 1):
        spread = (first, missed - first)
        if any(m > stratum.size for m, stratum in zip(spread, strata, strict=True)):
            continue
        samples = [itertools.combinations(range(stratum.size), stratum.drawn) for stratum in strata]
        seen = [
            sum(
                sum(row < m for row in sample) * stratum.size / stratum.drawn
                for sample, m, stratum in zip(pair, spread, strata, strict=True)
            )
            for pair in itertools.product(*samples)
        ]
        found = max(found, np.mean(np.array(seen) <= statistic + 1e-9))
    return found


@pytest.mark.parametrize("missed", [1, 3, 6, 11, 12])
@pytest.mark.parametrize("hits", [(0, 0), (1, 0), (0, 1), (1, 2)])
def test_p_values_are_those_of_counting(hits, missed):
    strata = [Stratum(5, 2), Stratum(6, 3)]
    assert p_value(hits, strata, missed) == pytest.approx(counted(hits, strata, missed) if missed < 12 else 0.0)


def test_one_stratum_is_the_hypergeometric_test():
    from scipy.stats import hypergeom

    for strata, hits in (([Stratum(200, 30), Stratum(0, 0)], [2, 0]), ([Stratum(200, 30)], [2])):
        assert p_value(hits, strata, 25) == pytest.approx(hypergeom.cdf(2, 200, 25, 30))


def test_what_a_clean_sample_certifies():
    """By hand: `m` rows are all missed by a sample of 45 % with probability `.55^m`, which is below .05 from 6 on."""
    strata = [Stratum(100_000, 45_000)]
    assert best_bound(strata, 10) == (10 - 5) / 10
    assert best_bound([Stratum(1000, 1000)], 10) == 1.0
    assert best_bound([Stratum(1000, 10)], 10) == 0.0


def recall(inside, outside, k):
    return np.isin(np.argsort(-np.concatenate([inside, outside]), kind="stable")[:k], np.arange(len(inside))).mean()


@pytest.mark.parametrize("skill", [0.5, 2.0, 8.0])
def test_it_is_above_the_truth_in_at_most_five_of_a_hundred_audits(skill):
    draw = np.random.default_rng(round(skill))
    scores = draw.standard_t(4, size=1500)
    order = np.argsort(-(skill * scores + draw.standard_t(4, size=1500)))
    chosen, near, far = np.split(scores[order], [60, 240])
    strata = [Stratum(180, 60), Stratum(1260, 200)]
    bounds = []
    for _ in range(300):
        samples = [draw.choice(rows, stratum.drawn, replace=False) for rows, stratum in zip((near, far), strata, strict=True)]
        bounds.append(recall_bound(chosen, samples, strata, 50))
    assert np.mean(np.array(bounds) > recall(chosen, scores[order][60:], 50)) <= 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5
    assert np.mean(bounds) > 0 or skill < 1, "a bound that says nothing is no bound"


def test_looking_at_everything_gives_the_truth():
    draw = np.random.default_rng(0)
    inside, outside = draw.normal(1, 1, 30), draw.normal(0, 1, 200)
    for k in (5, 20, 60):
        assert recall_bound(inside, [outside], [Stratum(200, 200)], k) == pytest.approx(recall(inside, outside, k))

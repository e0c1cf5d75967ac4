import math

import numpy as np
import pytest

from whence.linalg.stats import (
    agree,
    best_rank,
    bootstrap,
    bootstrap_groups,
    ends,
    paired_shares,
    pearson,
    ranks,
    resampled_pearson,
    resampled_spearman,
    spearman,
    student,
    wilson,
)


def test_wilsons_interval():
    half = wilson(5, 10)
    assert (half.mean, half.n) == (0.5, 10) and (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    none = wilson(0, 10)
    assert none.low == 0 and none.high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(10, 10).high == 1


def test_mcnemar_looks_only_at_questions_that_one_of_both_got_right():
    before = np.array([True] * 30 + [False] * 10 + [False] * 8)
    after = np.array([True] * 30 + [False] * 10 + [True] * 8)
    difference, p_value = paired_shares(before, after)
    assert difference.mean == pytest.approx(8 / 48) and p_value == pytest.approx(2 * 0.5**8)
    assert 0 < difference.low < difference.mean < difference.high
    back, same = paired_shares(after, before)
    assert (back.low, back.high) == pytest.approx((-difference.high, -difference.low)) and same == p_value


def test_equal_answers_do_not_differ():
    right = np.array([True, False, True, True])
    difference, p_value = paired_shares(right, right)
    assert difference.mean == 0 and p_value == 1 and difference.low == -difference.high < 0


def test_the_paired_interval_holds_the_truth_95_times_in_100():
    draw, held = np.random.default_rng(0), 0
    for _ in range(400):
        before = draw.random(60) < 0.4
        after = np.where(draw.random(60) < 0.7, before, draw.random(60) < 0.6)  # 0.7 * 0.4 + 0.3 * 0.6 = 0.46
        interval, _ = paired_shares(before, after)
        held += interval.low <= 0.06 <= interval.high
    assert 0.92 <= held / 400 <= 0.99


def test_bootstrap_of_a_mean():
    values = np.random.default_rng(1).normal(2.0, 1.0, 200)
    interval = bootstrap(np.append(values, math.nan), seed=0)
    assert interval.n == 200 and interval.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(200)
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_too_few_values_have_no_interval():
    one, none = bootstrap(np.array([3.0])), bootstrap(np.array([math.nan]))
    assert one.mean == 3 and math.isnan(one.low) and one.n == 1
    assert math.isnan(none.mean) and none.n == 0


def test_correlations_are_scipys():
    from scipy import stats

    x = np.random.default_rng(0).standard_normal((4, 30)).round(1)
    y = x + np.random.default_rng(1).standard_normal((4, 30)).round(1)
    expected = [(stats.pearsonr(a, b)[0], stats.spearmanr(a, b)[0]) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(np.stack([pearson(x, y), spearman(x, y)], axis=1), expected)
    found = agree(x, y)
    assert (found.pearson, found.spearman) == pytest.approx(tuple(np.mean(expected, axis=0)))
    assert found.pearson_se == pytest.approx(stats.sem([row[0] for row in expected]))
    assert spearman(ranks(x), x).tolist() == [1] * 4


def test_a_constant_has_no_correlation():
    x, y = np.array([[1.0, 2, 3], [1, 1, 1]]), np.array([[2.0, 4, 9], [1, 2, 3]])
    assert np.isnan(pearson(x, y)).tolist() == [False, True] and spearman(x, y).tolist() == [1, 0]
    assert agree(x, y).spearman == pytest.approx(1) and np.isnan(agree(x, y).pearson_se)


def test_intervals_are_over_groups_and_what_is_in_them():
    draw = np.random.default_rng(0)
    same = [draw.random(30) for _ in range(4)]
    apart = [values * 0.1 + number for number, values in enumerate(same)]
    narrow, wide = bootstrap_groups(same), bootstrap_groups(apart)
    error = np.concatenate(same).std() / 120**0.5
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * error * 2**0.5, rel=0.35)
    assert wide.high - wide.low > 1 and wide.low < wide.mean < wide.high
    assert np.isnan(bootstrap_groups([np.array([1.0])]).low)


def test_intervals_over_seeds_are_students():
    from scipy.stats import ttest_1samp

    values = np.array([0.5, 0.6, 0.55, 0.7])
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    found = student(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert np.isnan(student(values[:1]).low) and student(np.array([0.9, 1.0]), 0.0, 1.0).high == 1


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Over banks whose expected LDS is known: the 95 % interval covers it in most."""
    covered = 0
    expected = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman's of a bivariate normal with correlation 1/2
    for trial in range(60):
        draw = np.random.default_rng(trial)
        x = draw.standard_normal((20, 80))
        y = 0.5 * x + 0.75**0.5 * draw.standard_normal((20, 80))
        low, high = ends(resampled_spearman(x, y))
        covered += low <= expected <= high
    assert covered >= 50


def test_resamples_of_a_linear_correlation_are_those_of_what_is_drawn():
    draw = np.random.default_rng(0)
    x = 5 + draw.standard_normal((6, 60))
    y = x + draw.standard_normal((6, 60))
    slow = []
    for _ in range(400):
        k, q = draw.integers(60, size=60), draw.integers(6, size=6)
        slow.append(pearson(x[q][:, k], y[q][:, k]).mean())
    np.testing.assert_allclose(ends(resampled_pearson(x, y)), ends(np.array(slow)), atol=0.03)


def test_resamples_agree_with_recomputing_the_ranks():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((6, 60))
    y = x + draw.standard_normal((6, 60))
    quick = resampled_spearman(x, y)
    slow = []
    for _ in range(400):
        k, q = draw.integers(60, size=60), draw.integers(6, size=6)
        slow.append(spearman(x[q][:, k], y[q][:, k]).mean())
    np.testing.assert_allclose(ends(quick), ends(np.array(slow)), atol=0.03)


def test_ties_count_against_a_ranking():
    assert best_rank(np.zeros(10), [3, 4]) == 9
    assert best_rank(np.array([1.0, 0, 0]), [0]) == 1

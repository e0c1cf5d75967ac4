import math

import numpy as np
import pytest

from whence.evaluate.intervals import bootstrap, paired_shares, share


def test_wilsons_interval():
    half = share(5, 10)
    assert (half.mean, half.n) == (0.5, 10) and (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    none = share(0, 10)
    assert none.low == 0 and none.high == pytest.approx(0.2775, abs=1e-4)
    assert share(10, 10).high == 1


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

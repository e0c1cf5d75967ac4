import numpy as np
import pytest

from whence.errors import UsageError
from whence.linalg.stats import ranks
from whence.validate.bank import Bank, Spec, plain_spec
from whence.validate.lds import ceiling, compare, correlate, lds, leave_one_out, predictions

ROWS, QUERIES = 80, 12


def linear_bank(noise=0.0, kind="removals", subsets=100, seeds=(0, 1), drift=0.0):
    """A world where every row has a fixed effect on every query, and nothing else matters but noise of each training."""
    draw = np.random.default_rng(0)
    effects_QN = draw.standard_normal((QUERIES, ROWS))
    spec = Spec(kind, subsets=subsets, seeds=seeds, share=0.1)
    kept = spec.masks(ROWS)
    signal_KQ = -(effects_QN @ (~kept).T).T
    spread = signal_KQ.std()
    changes = np.stack([signal_KQ + noise * spread * draw.standard_normal(signal_KQ.shape) + drift for _ in seeds])
    return effects_QN, Bank(kept, changes.astype(np.float32), np.zeros((len(seeds), QUERIES)), {"spec": plain_spec(spec)})


@pytest.mark.parametrize("kind", ["removals", "halves"])
def test_the_true_effects_have_a_score_of_one(kind):
    effects, bank = linear_bank(kind=kind)
    found = lds(effects, bank)
    assert found.mean > 0.999 and found.interval.low > 0.99 and found.beats_chance


def test_leaving_one_row_out_is_judged_by_pearsons_correlation():
    spec = Spec("removals", subsets=30, seeds=(0,), share=1 / ROWS)
    draw = np.random.default_rng(0)
    effects_QN, kept = draw.standard_normal((QUERIES, ROWS)), spec.masks(ROWS)
    rows = (~kept).argmax(1)
    changes = (-effects_QN[:, rows].T + draw.standard_normal((30, QUERIES)))[None].astype(np.float32)
    found = leave_one_out(effects_QN, Bank(kept, changes, np.zeros((1, QUERIES)), {"spec": plain_spec(spec)}))
    expected = [np.corrcoef(-effects_QN[q, rows], changes[0, :, q])[0, 1] for q in range(QUERIES)]
    np.testing.assert_allclose(found.per_query, expected, atol=1e-6)
    assert found.interval.low < np.mean(expected) < found.interval.high
    constant = leave_one_out(np.zeros_like(effects_QN), Bank(kept, changes, np.zeros((1, QUERIES)), {"spec": plain_spec(spec)}))
    assert constant.mean == 0 and not constant.beats_chance


def test_negated_scores_are_negative():
    effects, bank = linear_bank(noise=0.5)
    right, wrong = lds(effects, bank), lds(-effects, bank)
    assert right.mean > 0.7 and wrong.mean == pytest.approx(-right.mean)
    assert not wrong.beats_chance and wrong.interval.high < 0


def test_shuffled_scores_are_no_better_than_chance():
    effects, bank = linear_bank(noise=0.5)
    shuffled = np.random.default_rng(5).permuted(effects, axis=1)
    found = lds(shuffled, bank)
    assert abs(found.mean) < 0.1 and not found.beats_chance
    other_queries = effects[np.roll(np.arange(QUERIES), 1)]
    assert not lds(other_queries, bank).beats_chance


def test_a_constant_has_no_correlation():
    _, bank = linear_bank()
    assert lds(np.ones((QUERIES, ROWS)), bank).mean == 0


def test_the_scale_of_a_query_and_what_all_subsets_share_play_no_part():
    effects, bank = linear_bank(noise=0.3)
    _, drifted = linear_bank(noise=0.3, drift=100.0)
    scaled = effects * np.arange(1, QUERIES + 1)[:, None]
    np.testing.assert_allclose(lds(scaled, bank).per_query, lds(effects, bank).per_query)
    np.testing.assert_allclose(lds(effects, drifted).per_query, lds(effects, bank).per_query, atol=0.02)


def test_kept_or_left_out_rows_predict_the_same():
    effects, bank = linear_bank()
    kept = effects @ bank.kept.T
    np.testing.assert_allclose(ranks(predictions(effects, bank)), ranks(kept))


def test_more_seeds_come_closer_and_the_ceiling_says_how_close():
    effects, bank = linear_bank(noise=1.0, seeds=(0, 1, 2, 3), subsets=400)
    one, all_ = lds(effects, bank, 0), lds(effects, bank, slice(None))
    assert all_.mean > one.mean + 0.1
    single = correlate(bank.changes[1].T, bank.changes[0].T).mean
    # noise as large as the signal: reliability 1/2, the best predictor reaches its root
    assert single == pytest.approx(0.48, abs=0.05) and one.mean == pytest.approx(single**0.5, abs=0.05)
    corrected = 4 * single / (1 + 3 * single)  # Spearman-Brown: the reliability of a mean over four seeds
    assert all_.mean == pytest.approx(corrected**0.5, abs=0.05)
    assert single < ceiling(bank).mean < one.mean  # three trainings predict better than one, the truth best


def test_a_ceiling_takes_two_seeds():
    with pytest.raises(UsageError, match="second seed"):
        ceiling(linear_bank(seeds=(0,))[1])


def test_differences_are_paired():
    """Two methods that differ by little on the same noisy bank: the difference is known better than either."""
    effects, bank = linear_bank(noise=1.5)
    worse = effects + 0.7 * np.random.default_rng(1).standard_normal(effects.shape)
    better, other = lds(effects, bank), lds(worse, bank)
    gap = better.minus(other)
    assert gap.low > 0 and gap.mean == pytest.approx(better.mean - other.mean)
    own = better.interval.high - better.interval.low
    assert gap.high - gap.low < own
    table = compare({"better": better, "worse": other}, "better")
    assert [row["method"] for row in table] == ["better", "worse"]
    assert table[1]["behind"] == pytest.approx(gap.mean) and "behind" not in table[0]


def test_wrong_scores_are_refused():
    effects, bank = linear_bank()
    with pytest.raises(UsageError, match="other queries or rows"):
        lds(effects[:, :-1], bank)
    with pytest.raises(UsageError, match="finite"):
        lds(np.where(effects > 2, np.nan, effects), bank)


def test_the_mean_of_scores_of_several_seeds():
    effects, bank = linear_bank()
    noisy = [effects + 2 * np.random.default_rng(10 + s).standard_normal(effects.shape) for s in range(6)]
    assert lds(np.mean(noisy, axis=0), bank).mean > lds(noisy[0], bank).mean + 0.1

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import whence
from whence.errors import UsageError
from whence.store.memory import Memory
from whence.validate import checks
from whence.validate.checks import check_removal
from whence.validate.removal import (
    agreement,
    brittleness,
    damping_sweep,
    lead,
    measured_without,
    removal,
    stability,
    tail_patch,
)
from whence.validate.settings import setting
from whence.validate.trainer import Recipe

RECIPE = Recipe(0.02, 20, 20, "momentum", weight_decay=0.01, schedule="cosine")


def scored(small):
    model = small.trained([0]).copy_of(0)
    curvature = whence.fit(model, small.task, small.train, modules="all", examples="all", eigenvalue_examples="all")
    return model, curvature, whence.score(model, small.task, small.queries, small.train, curvature.inverse(damping=0.1)).raw


@pytest.fixture(scope="module")
def diabetes():
    whole = setting("diabetes")
    small = replace(whole, train=whole.train[:100], queries=whole.queries[:16], recipe=RECIPE)
    return small, *scored(small)


@pytest.fixture(scope="module")
def digits():
    whole = setting("digits")

    def model(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 10))

    small = replace(whole, model=model, train=whole.train[:150], queries=whole.queries[:16], recipe=replace(RECIPE, epochs=10))
    return small, *scored(small)


def shuffled(scores):
    return np.random.default_rng(3).permuted(scores, axis=1)


def test_without_the_top_rows_losses_rise_and_without_the_bottom_rows_they_fall(diabetes):
    small, _, _, scores = diabetes
    found = removal(small, scores, 0.1, controls=6)
    effects = found.effects
    assert found.rows == 10 and found.beats_random
    assert effects["top"].low > 0 > effects["bottom"].high
    assert abs(effects["random"].mean) < 0.3 * effects["top"].mean


def test_negated_scores_fail_the_removal(diabetes):
    small, _, _, scores = diabetes
    right, wrong = removal(small, scores, 0.1, controls=6), removal(small, -scores, 0.1, controls=6)
    assert not wrong.beats_random and wrong.effects["top"].high < 0
    np.testing.assert_allclose(wrong.top, right.bottom, atol=1e-5)
    assert "no more than random" in wrong.summary()[-1]


def test_shuffled_scores_fail_the_removal(diabetes):
    small, _, _, scores = diabetes
    assert not removal(small, shuffled(scores), 0.1, controls=6).beats_random


def test_removed_rows_are_those_of_the_scores(diabetes):
    small, _, _, scores = diabetes
    top = np.argsort(-scores[3])[:10]
    measured = measured_without(small, [top, []])
    expected = measured[1, 3] - measured[0, 3]
    np.testing.assert_allclose(removal(small, scores, 0.1, controls=1).top[3], expected, atol=1e-5)


def test_a_step_on_the_top_rows_helps(diabetes):
    small, model, _, scores = diabetes
    found = tail_patch(small, model, scores, k=8, learning_rate=0.01)
    assert found.beats_random and found.effects["top"].low > 0
    assert not tail_patch(small, model, -scores, k=8, learning_rate=0.01).beats_random
    assert not tail_patch(small, model, shuffled(scores), k=8, learning_rate=0.01).beats_random


def test_a_step_is_the_mean_gradient_of_the_rows(diabetes):
    """To first order the gain is rate * <query gradient, mean row gradient>, which the identity's scores are."""
    small, model, _, _ = diabetes
    curvature = whence.fit(model, small.task, small.train, method="identity", modules="all")
    dots = whence.score(model, small.task, small.queries, small.train, curvature.inverse(damping=0)).raw
    found = tail_patch(small, model, dots, k=5, learning_rate=1e-4)
    expected = 1e-4 * np.sort(dots, axis=1)[:, -5:].mean(1)
    np.testing.assert_allclose(found.gains, expected, rtol=0.03, atol=1e-6)


def test_brittleness_finds_the_smallest_share(digits):
    small, _, _, scores = digits
    found = brittleness(small, scores, limit=0.4, rounds=5)
    chance = brittleness(small, shuffled(scores), limit=0.4, rounds=5)
    wrong = brittleness(small, -scores, limit=0.4, rounds=5)
    assert found.flipped > chance.flipped + 0.2 and found.flipped > wrong.flipped + 0.2
    # what it says is so: with these rows gone the class is another one
    first = int(np.flatnonzero(np.isfinite(found.shares))[0])
    right = [q for q in range(16) if measured_margin(small, [])[q] > 0]
    order = np.argsort(-scores[right[first]], kind="stable")
    count = round(found.shares[first] * 150)
    assert measured_margin(small, order[:count])[right[first]] <= 0


def measured_margin(small, rows):
    task = whence.Classification(measurement=lead)
    return measured_without(replace(small, task=task), [rows])[0]


def test_brittleness_takes_classes(diabetes):
    with pytest.raises(UsageError, match="Only classifiers"):
        brittleness(diabetes[0], diabetes[3])


def test_agreement_of_rankings():
    scores = np.random.default_rng(0).standard_normal((5, 200))
    same, opposite = agreement(scores, 3 * scores + 1, k=10), agreement(scores, -scores, k=10)
    assert (same.jaccard == 1).all() and np.allclose(same.rank_correlation, 1)
    assert (opposite.jaccard == 0).all() and np.allclose(opposite.rank_correlation, -1)
    moved = scores.copy()
    moved[0, np.argsort(-scores[0])[:5]] -= 100  # five of its ten leave the top
    assert agreement(scores[:1], moved[:1], k=10).overlap[0] == pytest.approx(0.5)
    assert agreement(scores[:1], moved[:1], k=10).jaccard[0] == pytest.approx(5 / 15)
    assert abs(agreement(scores, shuffled(scores)).rank_correlation.mean()) < 0.15


def test_stability_across_seeds():
    truth = np.random.default_rng(0).standard_normal((4, 100))
    noisy = [truth + 0.3 * np.random.default_rng(1 + s).standard_normal(truth.shape) for s in range(3)]
    found = stability(noisy, k=10)
    assert len(found.pairs) == 3 and found.rank_correlation > 0.85 and found.jaccard > 0.4
    assert stability([truth, shuffled(truth)], k=10).jaccard < 0.2
    with pytest.raises(UsageError, match="two seeds"):
        stability([truth])


def test_damping_sweep(diabetes):
    small, model, curvature, _ = diabetes

    def score_at(damping):
        return whence.score(model, small.task, small.queries, small.train, curvature.inverse(damping=damping)).raw

    found = damping_sweep(score_at, (0.01, 0.1, 10.0, 1e6))
    table = {row["damping"]: row for row in found.table()}
    assert table[0.1]["rank_correlation"] == pytest.approx(1) and table[0.1]["overlap"] == 1
    assert table[0.01]["rank_correlation"] < 0.999 and table[10.0]["rank_correlation"] > table[1e6]["rank_correlation"] - 0.02
    assert "damping 0.01 against 0.1" in found.summary()[0]


def test_removals_that_were_measured_are_not_measured_again(diabetes, monkeypatch):
    small, kept, measured = diabetes[0], Memory(), []

    def counted(setting, scores, share, **settings):
        measured.append(share)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return removal(setting, scores, share, **settings)

    monkeypatch.setattr(checks, "removal", counted)
    settings = {"shares": (0.05, 0.1), "queries": 3, "methods": ("identity",)}
    with pytest.raises(KeyboardInterrupt):
        check_removal(small, **settings, folder=kept)
    found = check_removal(small, **settings, folder=kept)
    assert measured == [0.05, 0.1, 0.1] and found.table() == check_removal(small, **settings).table()

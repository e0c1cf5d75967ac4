from dataclasses import replace

import numpy as np
import pytest

import whence
from whence.errors import UsageError
from whence.store.memory import Memory
from whence.validate import removal as module
from whence.validate.removal import check_removal, effects, measured_without, removal
from whence.validate.settings import setting
from whence.validate.trainer import Recipe

RECIPE = Recipe(0.02, 20, 20, "momentum", weight_decay=0.01, schedule="cosine")


def scored(small):
    model = small.trained([0]).copy_of(0)
    curvature = whence.fit(model, small.task, small.train, modules="all", examples="all", eigenvalue_examples="all")
    return whence.score(model, small.task, small.queries, small.train, curvature.inverse(damping=0.1)).raw


@pytest.fixture(scope="module")
def diabetes():
    whole = setting("diabetes")
    small = replace(whole, train=whole.train[:100], queries=whole.queries[:16], recipe=RECIPE)
    return small, scored(small)


def shuffled(scores):
    return np.random.default_rng(3).permuted(scores, axis=1)


def test_without_the_top_rows_losses_rise_and_without_the_bottom_rows_they_fall(diabetes):
    small, scores = diabetes
    found = effects(removal(small, scores, 0.1, controls=6))
    assert found["top - random"].low > 0 and found["top"].low > 0 > found["bottom"].high
    assert abs(found["random"].mean) < 0.3 * found["top"].mean


def test_negated_scores_fail_the_removal(diabetes):
    small, scores = diabetes
    right, wrong = removal(small, scores, 0.1, controls=6), removal(small, -scores, 0.1, controls=6)
    assert effects(wrong)["top - random"].low <= 0 and effects(wrong)["top"].high < 0
    np.testing.assert_allclose(wrong["top"], right["bottom"], atol=1e-5)


def test_shuffled_scores_fail_the_removal(diabetes):
    small, scores = diabetes
    assert effects(removal(small, shuffled(scores), 0.1, controls=6))["top - random"].low <= 0


def test_removed_rows_are_those_of_the_scores(diabetes):
    small, scores = diabetes
    top = np.argsort(-scores[3])[:10]
    measured = measured_without(small, [top, []])
    expected = measured[1, 3] - measured[0, 3]
    np.testing.assert_allclose(removal(small, scores, 0.1, controls=1)["top"][3], expected, atol=1e-5)


def test_scores_of_other_rows_are_refused(diabetes):
    with pytest.raises(UsageError, match="other queries or rows"):
        removal(diabetes[0], diabetes[1][:, 1:])


def test_removals_that_were_measured_are_not_measured_again(diabetes, monkeypatch):
    small, kept, measured = diabetes[0], Memory(), []

    def counted(setting, scores, share, **settings):
        measured.append(share)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return removal(setting, scores, share, **settings)

    monkeypatch.setattr(module, "removal", counted)
    settings = {"shares": (0.05, 0.1), "queries": 3, "methods": ("identity",)}
    with pytest.raises(KeyboardInterrupt):
        check_removal(small, **settings, folder=kept)
    found = check_removal(small, **settings, folder=kept)
    assert found.row(method="gradient dot", share=0.1, removed="top")["rows"] == 10
    assert measured == [0.05, 0.1, 0.1] and found.tables == check_removal(small, **settings).tables

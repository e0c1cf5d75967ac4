"""Leaving rows out of training, beside influence."""

import numpy as np
import pytest
import torch
from torch import nn

from whence.errors import UsageError
from whence.tasks import Classification
from whence.validate import ladder
from whence.validate.loo import CEILING, COLD, MEAN, WARM, check_loo, is_convex, loo_result, loo_setting
from whence.validate.methods import EXACT
from whence.validate.settings import Setting, seeded
from whence.validate.trainer import Recipe

SMALL = {"rows": 5, "queries": 5, "methods": ()}


def points(build, recipe):
    """Forty points of two classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator)
    noise = torch.randn(50, generator=generator)
    pairs = [(x[i], int(x[i, 0] + 0.5 * x[i, 1] + noise[i] > 0)) for i in range(50)]
    return Setting("points", "points", lambda seed: seeded(seed, build), Classification(), pairs[:40], pairs[40:], recipe)


@pytest.fixture
def convex():
    return points(lambda: nn.Linear(4, 2), Recipe(0.5, 120, 40, "momentum", weight_decay=0.05))


@pytest.fixture
def crowded():
    """Far more weights than rows, trained until it fits them."""
    build = lambda: nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))  # noqa: E731
    return points(build, Recipe(0.3, 60, 8, "momentum"))


def test_convex_model_is_predicted_from_any_start(convex):
    found = check_loo(convex, **SMALL, seeds=(0, 1))
    assert found.about["convex"] and found.about["damping"] == 0.05, "its own weight decay is its damping"
    for way in (COLD, MEAN, WARM):
        assert found.row(retraining=way, compared=EXACT)["pearson"] > 0.99
    assert found.row(compared=CEILING)["pearson"] > 0.999 and found.row(retraining=WARM)["control"] < 0.01
    assert "predicts" in found.says[1]
    effects, scores = found.arrays["effects"], found.arrays["scores"]
    size = np.linalg.norm(scores[EXACT]) / np.linalg.norm(effects[COLD])
    assert 0.8 < size < 1.2, "in nats per copy, not only in rank"
    for spoil in (lambda x: -x, lambda x: np.random.default_rng(0).permutation(x.T).T):
        assert "NOT" in loo_result(found.about, effects, {EXACT: spoil(scores[EXACT])}, 0.0).says[1]


def test_crowded_network_is_not_and_that_is_said(crowded, convex):
    found = check_loo(crowded, **SMALL, seeds=(0, 1))
    assert not found.about["convex"] and found.row(retraining=COLD, compared=EXACT)["pearson"] < 0.9
    assert "does NOT predict well" in found.says[1] and "cannot" not in found.says[1]
    assert found.row(compared=CEILING)["pearson"] < 0.9, "another seed does not agree either"
    assert "trusted" in found.says[-1]
    page = found.markdown()
    assert "another seed" in page and "| warm start |" in page


def test_killed_check_goes_on(convex, tmp_path, monkeypatch):
    trained, plain = [], ladder.retrain

    def counted(*given, **settings):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(settings["progress"])
        return plain(*given, **settings)

    monkeypatch.setattr(ladder, "retrain", counted)
    settings = {**SMALL, "seeds": (0, 1)}
    with pytest.raises(KeyboardInterrupt):
        check_loo(convex, **settings, out=tmp_path / "loo")
    monkeypatch.setattr(ladder, "retrain", lambda *given, **options: trained.append("more") or plain(*given, **options))
    found = check_loo(convex, **settings, out=tmp_path / "loo")
    assert trained.count("more") == 2, "one of three trainings was kept"
    fresh = check_loo(convex, **settings)
    np.testing.assert_array_equal(found.arrays["effects"][COLD], fresh.arrays["effects"][COLD])


def test_settings_by_name():
    assert is_convex(loo_setting("linear").model(0)) and not is_convex(loo_setting("digits").model(0))
    assert len(loo_setting("cancer").train) == 398
    with pytest.raises(UsageError, match="no setting"):
        loo_setting("iris")


def test_mistakes_are_named(convex):
    with pytest.raises(UsageError, match="takes a seed"):
        check_loo(convex, seeds=())
    with pytest.raises(UsageError, match="no method"):
        check_loo(convex, methods=("lissa",))

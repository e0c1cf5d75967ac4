from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from whence.data import as_rows
from whence.errors import UsageError
from whence.store.manifest import Folder
from whence.tasks import Classification
from whence.validate import mislabel as module
from whence.validate.mislabel import METHODS, area, labels_of, mislabel, plant, recall_at, relabelled
from whence.validate.settings import Setting, seeded, setting
from whence.validate.trainer import Recipe


def blobs(rows):
    """Three clouds in the plane, 3 apart."""
    draw = torch.Generator().manual_seed(0)
    centres = 3 * torch.tensor([[0.0, 1.0], [0.9, -0.5], [-0.9, -0.5]])
    return [(centres[n % 3] + torch.randn(2, generator=draw), n % 3) for n in range(rows)]


@pytest.fixture(scope="module")
def clouds():
    def model(seed):
        return seeded(seed, lambda: nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)))

    rows = blobs(160)
    recipe = Recipe(0.1, 20, 20, "momentum", weight_decay=1e-3, schedule="cosine")
    return Setting("clouds", "three clouds", model, Classification(), rows[:120], rows[120:], recipe)


def test_influence_finds_planted_errors(clouds):
    found = mislabel(clouds, seeds=(0, 1))
    assert found.about["passed"] and found.row(method=METHODS[0])["found in 20%"] >= 0.9
    assert found.row(method=METHODS[1])["found in 20%"] >= 0.7 and found.row(method="random")["found in 20%"] < 0.6
    assert found.about["accuracy"]["mean"] > 0.9 and found.about["fitted"]["mean"] < 0.3
    assert [row["method"] for row in found.tables[""]] == list(METHODS)
    assert "as it should" in "\n".join(found.says)
    assert not any("better than random" in flag for flag in found.flags)
    with pytest.raises(UsageError, match="was not measured"):
        found.row(method="LiSSA")


@pytest.mark.parametrize("spoil", [lambda raw: -raw, lambda raw: np.random.default_rng(3).permuted(raw, axis=1)])
def test_it_fails_where_scores_are_negated_or_shuffled(clouds, monkeypatch, spoil):
    whole = module.self_influence_at
    monkeypatch.setattr(module, "self_influence_at", lambda *given: replace(it := whole(*given), raw=spoil(it.raw)))
    found = mislabel(clouds, seeds=(0, 1))
    assert not found.about["passed"] and found.row(method=METHODS[0])["found in 20%"] < 0.6
    assert "FLAG less than 90%" in "\n".join(found.says)
    assert {"gradient norm", "loss", "random"} == {flag.split("better than ")[1].split(":")[0] for flag in found.flags}


def test_seeds_that_were_measured_are_not_measured_again(clouds, monkeypatch, tmp_path):
    whole, retrained = module.retrain, []

    def counted(*given, **settings):
        retrained.append(settings["seeds"])
        if len(retrained) == 2:
            raise KeyboardInterrupt
        return whole(*given, **settings)

    monkeypatch.setattr(module, "retrain", counted)
    for _ in range(2):
        with Folder.claim(tmp_path / "kept", {"stage": "mislabel"}) as folder:
            if not retrained:
                with pytest.raises(KeyboardInterrupt):
                    mislabel(clouds, seeds=(0, 1), folder=folder)
            else:
                found = mislabel(clouds, seeds=(0, 1), folder=folder)
    assert retrained == [[0], [1], [1]]
    fresh = mislabel(clouds, seeds=(0, 1))
    assert [row | {"seconds": 0} for row in found.tables[""]] == [row | {"seconds": 0} for row in fresh.tables[""]]
    assert all(found.about[name] == fresh.about[name] for name in ("accuracy", "fitted"))


def test_only_the_chosen_labels_are_wrong():
    labels = np.arange(200) % 10
    wrong, noisy = plant(labels, 10, 0.1, seed=1)
    assert wrong.sum() == 20 and (noisy != labels).tolist() == wrong.tolist() and set(noisy) <= set(range(10))
    assert not np.array_equal(plant(labels, 10, 0.1, seed=2)[0], wrong)


def test_rows_of_both_kinds_get_other_labels():
    pairs = relabelled(blobs(3), np.array([2, 2, 2]))
    assert labels_of(pairs).tolist() == [2, 2, 2] and pairs[1][0] is not None
    rows = as_rows([{"text": "good", "label": 1}, {"text": "bad", "label": 0}])
    changed = relabelled(rows, np.array([0, 0]))
    assert changed.ids == rows.ids and labels_of(changed).tolist() == [0, 0] and changed.fingerprint != rows.fingerprint


def test_recall_and_area_on_cases_that_are_clear():
    wrong = np.array([True, True] + [False] * 8)
    best, draw = np.arange(10, 0, -1.0), np.random.default_rng(0)
    assert recall_at(best, wrong, 0.2, draw) == 1 and recall_at(best, wrong, 0.1, draw) == 0.5
    assert recall_at(-best, wrong, 0.5, draw) == 0
    assert (area(best, wrong), area(-best, wrong), area(np.zeros(10), wrong)) == (1, 0, 0.5)
    told = [recall_at(np.zeros(10), wrong, 0.2, draw) for _ in range(400)]
    assert 0.15 < np.mean(told) < 0.25  # not telling is chance, whatever the order of the rows


def test_numbers_can_have_no_wrong_label():
    with pytest.raises(UsageError, match="no labels"):
        mislabel(setting("diabetes"))

"""Rows on top of scores are left out of the run's own training: good scores stand out, bad ones are said to be bad."""

import json
from dataclasses import replace

import numpy as np
import pytest
from models import texts, tokenizer
from trainings import trained

from whence.data import as_rows
from whence.engine.point import Point
from whence.engine.stream import encode
from whence.errors import StaleArtifact, UsageError
from whence.linalg.stats import spearman
from whence.methods.base import Request
from whence.models import load_model
from whence.tasks import CausalLM
from whence.train.patch import patch
from whence.train.record import read_training
from whence.train.retrain import retrain
from whence.validate.bank import Spec, open_bank
from whence.validate.without import (
    NOT_CALIBRATED,
    OTHERS,
    RANDOM,
    SCORES,
    Removals,
    calibrated,
    check_patch,
    check_subsets,
    check_without,
    keep_beside,
    read_beside,
)

ROWS, N = as_rows(texts(12, seed=1)), 12
TASK = CausalLM(tokenizer())


@pytest.fixture(scope="module")
def request_(tmp_path_factory):
    chosen = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 4, "evaluation": 0, "log_steps": 2, "save_steps": 9}
    training = read_training(trained(tmp_path_factory.mktemp("without"), ROWS, chosen, {"train": {}}) / "train")
    queries = as_rows(texts(5, seed=2))
    return Request(Point(load_model(training.model)[0], TASK, ROWS), queries, training=training)


@pytest.fixture(scope="module")
def truth(request_):
    """What leaving out each row lowers each query by: the best scores that there are."""
    found = retrain(request_.training, 1 - np.eye(N), request_.point, request_.asked, together=4)
    return request_.scores_of(found.falls.T, "leaving one out", "nats per copy", measured=True)


def test_a_gain_is_not_known_whose_interval_is_wide(truth):
    """Three queries: of the same gain, of gains that differ sixfold, and of one that is a hundred times the others."""
    predicted_KQ = np.ones((2, 3))
    for gains, certain in (([0.2, 0.2, 0.2], True), ([0.1, 0.3, 0.6], True), ([0.01, 0.01, 1.0], False)):
        found = calibrated(predicted_KQ, predicted_KQ * gains, truth)
        assert found["certain"] == certain and found["gain"] == pytest.approx(np.mean(gains))
        assert found["says"].startswith("calibrated on 2" if certain else NOT_CALIBRATED)
    assert "0.01 to 1 times as much" in found["says"]


def test_scores_that_are_right_stand_out_and_others_do_not(request_, truth):
    chosen = Removals(rows=1, draws=3)
    held_out = encode(TASK, as_rows(texts(3, seed=5)), request_.point.model)
    found = check_without(request_, truth, chosen, held_out=held_out)
    row = found.row(**{"rows chosen by": SCORES})
    np.testing.assert_allclose(row["fall"], truth.raw.max(1).mean(), rtol=1e-3)
    assert found.about["stands_out"][RANDOM] and found.about["stands_out"][OTHERS]
    assert "stands out above" in found.says[0] and np.isfinite(row["held_out_rise"])
    assert found.row(**{"rows chosen by": "nothing: repeated as it was"})["fall"] == pytest.approx(0, abs=1e-3)
    scale = found.about["calibration"]
    assert scale["gain"] == pytest.approx(1, abs=0.01) and scale["held_out_slope"] == pytest.approx(1, abs=0.01)
    assert scale["says"].startswith(f"calibrated on {scale['retrainings']} retrainings")
    twice = check_without(request_, truth * 2, chosen).about["calibration"]
    assert twice["gain"] == pytest.approx(0.5, abs=0.01) and twice["low"] <= twice["gain"] <= twice["high"]

    negated = check_without(request_, truth * -1, chosen)
    assert not any(negated.about["stands_out"].values()) and "does not stand out above" in negated.says[0]
    assert negated.row(**{"rows chosen by": SCORES})["fall"] < 0 and "not calibrated" in negated.about["calibration"]["says"]
    order = np.random.default_rng(3).permutation(N)
    shuffled = check_without(request_, replace(truth, raw=truth.raw[:, order]), chosen)
    assert not shuffled.about["stands_out"][RANDOM] and shuffled.about["calibration"]["correlation"] < 0.5


def test_what_each_retraining_left_out_is_told(request_, truth):
    found = check_without(request_, truth, Removals(fraction=0.2, queries=2, draws=2, orders=2, jointly=True))
    left_out = [set(rows) for rows in found.as_json()["left_out"]]
    assert found.about["rows"] == 2 and all(len(rows) == 2 for rows in left_out)
    best = set(np.argsort(-truth.raw[[0, 4]].sum(0))[:2])
    assert best in left_out and OTHERS not in found.about["stands_out"]
    assert found.arrays["falls"].shape == (2, len(left_out), 5) and found.about["retrainings"] == 2 * len(left_out)
    assert len(found.tables["Query by query"]) == 2
    json.dumps(found.as_json(), allow_nan=False)


def test_one_query_is_held_against_draws(request_, truth):
    found = check_without(request_, truth, Removals(rows=1, queries=1, draws=4))
    assert found.about["stands_out"][RANDOM] is not None and found.about["stands_out"]["length"] is None
    assert "can't be told from" in found.says[0] and "not calibrated" not in found.says[3]
    with pytest.raises(UsageError, match="can't be left out"):
        check_without(request_, truth, Removals(rows=N))


def test_a_step_more_tells_good_scores_from_bad_ones(request_):
    """Scores that are right here say what a step on each row by itself raises."""
    found = patch(request_.training, [[row] for row in range(N)], request_.point, request_.asked)
    right = request_.scores_of(-found.falls.T, "a step on one", "nats", measured=True)
    made = check_patch(request_, right, Removals(rows=1, draws=3))
    assert made.check == "tail-patch" and made.about["stands_out"][RANDOM] and made.about["stands_out"][OTHERS]
    assert made.says[0].startswith(
        "After one more step on the row that the scores put on top, log p of the answers to 5 queries rises by"
    )
    own = made.row(**{"rows chosen by": SCORES})
    assert own["rise"] == pytest.approx(right.raw.max(1).mean(), rel=1e-5) and own["sets of rows"] <= 5
    assert made.row(**{"rows chosen by": RANDOM})["sets of rows"] <= 3
    assert [len(rows) for rows in made.as_json()["rows"]] == [1] * made.about["sets"]
    bad = check_patch(request_, right * -1, Removals(rows=1, draws=3), steps=2)
    assert not any(bad.about["stands_out"].values()) and "does not stand out above" in bad.says[0]
    assert bad.says[0].startswith("After 2 more steps") and bad.row(**{"rows chosen by": SCORES})["rise"] < own["rise"]
    json.dumps(made.as_json(), allow_nan=False)


def test_subsets_are_a_bank(request_, truth, tmp_path):
    spec = Spec("removals", subsets=12, seeds=(0, 1), share=0.2)
    found = check_subsets(request_, truth, spec, bank=tmp_path / "bank-removals.npz")
    assert found.row(method=SCORES)["lds"] > 0.9 and found.row(method="another order (noise ceiling)")["lds"] < 0.99
    bank = open_bank(tmp_path / "bank-removals.npz")
    predicted = -(truth.raw @ (~bank.kept).T)
    assert found.row(method=SCORES)["lds"] == pytest.approx(spearman(predicted, bank.of(0).T).mean(), abs=1e-3)


def test_calibration_is_least_squares(truth):
    draw = np.random.default_rng(0)
    predicted = draw.standard_normal((9, 5))
    found = calibrated(predicted, 0.3 * predicted + 0.01 * draw.standard_normal((9, 5)), truth)
    assert found["low"] < found["gain"] < found["high"] and found["gain"] == pytest.approx(0.3, abs=0.01)
    assert "not calibrated" in calibrated(predicted, draw.standard_normal((9, 5)) * 10, truth)["says"]
    assert calibrated(predicted * 0, predicted, truth)["gain"] is None


def test_what_was_found_is_said_beside_the_scores(request_, truth, tmp_path):
    assert read_beside(tmp_path) == {}
    found = check_without(request_, truth, Removals(rows=1, draws=1, queries=2))
    keep_beside(found, tmp_path)
    keep_beside(check_patch(request_, truth, Removals(rows=1, draws=1, queries=2)), tmp_path)
    kept = read_beside(tmp_path)
    assert kept["removal"]["sentence"] == found.says[0] and kept["tail-patch"]["sentence"].startswith("After one more step")
    file = tmp_path / "removal.json"
    file.write_text(file.read_text().replace("stands out", "stands 0ut"))
    with pytest.raises(StaleArtifact):
        read_beside(tmp_path)

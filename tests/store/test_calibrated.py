"""Values as large as retrainings say: raw scores, their order and other units stay as they are."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from whence.report import words
from whence.store.scores import Scores

KNOWN = {
    "gain": 0.1,
    "low": 0.05,
    "high": 0.2,
    "certain": True,
    "retrainings": 7,
    "operator": "EK-FAC",
    "measurement": "logprob",
}
KNOWN |= {"says": "calibrated on 7 retrainings: leaving rows out changed log p by 0.1"}


@pytest.fixture
def scores():
    raw = np.array([[30.0, 2.0, -4.0]], dtype=np.float32)
    examples = pd.DataFrame({"id": list("uvw"), "source": ["a", "a", "b"], "copies": 1, "tokens": 2, "text": list("uvw")})
    queries = {
        "id": ["q"],
        "text": ["a b"],
        "prompt": ["a"],
        "completion": [" b"],
        "tokens": [1],
        "measured": [-0.5],
        "norm": [1.0],
    }
    about = {"unit": "nats per copy", "operator": "EK-FAC", "measurement": "logprob"}
    norms = {"gradient": np.full(3, 2.0), "self": np.full(3, 4.0)}
    tokens = np.array([[10.0, 20.0, 1.0, 1.0, -1.0, -3.0]], dtype=np.float32)
    return Scores(raw, 10, examples, queries, about, norms, {"mlp": raw}, tokens)


def test_values_are_the_gain_times_the_slopes_and_raw_scores_stay(scores):
    found = scores.calibrated(KNOWN)
    assert found.gain == 0.1 and scores.gain == 1.0
    np.testing.assert_allclose(found.values, 0.1 * scores.values)
    np.testing.assert_array_equal(found.raw, scores.raw)
    assert found.values.dtype == scores.values.dtype
    top, plain = found.top(0, 3), scores.top(0, 3)
    assert list(top["id"]) == list(plain["id"]) and list(top["raw"]) == list(plain["raw"])
    np.testing.assert_allclose(top["share"], plain["share"], rtol=1e-6)
    np.testing.assert_allclose(found.token_scores(0, "u"), [0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(found.by("source")["a"], 0.32, rtol=1e-6)
    assert found.module_values(0, [0, 1])["mlp"] == pytest.approx(0.32)
    assert found.unit == "nats per copy" and found.normalised("length").values[0, 0] == pytest.approx(0.15)


def test_what_is_beyond_first_order_is_asked_of_the_calibrated_value(scores):
    found = scores.calibrated(KNOWN)
    assert scores.beyond().tolist() == [True, False, False] and not found.beyond().any()
    said = "beyond first order: at most +0.500, from p = 0.607"
    assert [words.impossible(scores, 0, change) for change in (0.51, 0.49, -9.0)] == [said, "", ""]
    loss = replace(scores, queries=scores.queries.assign(measured=0.5), about={**scores.about, "measurement": "loss"})
    said = said.replace("at most +", "at least -")
    assert [words.impossible(loss, 0, change) for change in (-0.51, -0.49, 9.0)] == [said, "", ""]
    odds = replace(scores, about={**scores.about, "measurement": "margin"})
    assert words.impossible(odds, 0, 99.0) == ""


def test_what_is_said(scores):
    found = scores.calibrated(KNOWN)
    assert words.size(found) == KNOWN["says"] and "calibrated on 7 retrainings (0.1 x the slope)" in words.sign(found, 0)
    assert (
        words.meaning(found).startswith("A value is 0.1 times the slope") and words.limits(found)[0] == words.CALIBRATED_LIMIT
    )
    assert words.size(scores) == words.NOT_CALIBRATED and words.meaning(scores) == words.SLOPE
    assert words.size(scores.named("BM25", "BM25")) == ""


@pytest.mark.parametrize("other", [{"operator": "gradient dot product"}, {"measurement": "loss"}])
def test_a_gain_is_not_that_of_other_scores(scores, other):
    assert scores.calibrated(KNOWN | other) is scores and scores.calibrated(None) is scores


def test_a_gain_that_leaves_open_the_size_is_said_and_not_applied(scores):
    found = scores.calibrated(KNOWN | {"certain": False, "low": -0.1, "says": "not calibrated: slope at these weights (7)"})
    assert found.gain == 1.0 and words.size(found).endswith("(7)")
    np.testing.assert_array_equal(found.values, scores.values)


@pytest.mark.parametrize("how", ["cosine", "relatif"])
def test_a_likeness_has_no_gain(scores, how):
    found = scores.calibrated(KNOWN).normalised(how)
    np.testing.assert_array_equal(found.values, scores.normalised(how).values)
    assert found.gain == 1.0 and words.size(found) == words.NOT_CALIBRATED

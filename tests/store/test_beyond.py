"""Which slopes are more than what was measured can change by: log p ends at 0, a loss too, log-odds don't."""

import math

import numpy as np
import pandas as pd
import pytest

from whence.report import words
from whence.store.scores import Scores

VALUES = np.array([[3.0, 0.31, 0.29, -0.29, -0.31, -3.0]])


def made(measurement="logprob", measured=-0.3, unit="nats per copy", n_train=10, **more):
    columns = {
        "id": ["q"],
        "text": ["a b"],
        "prompt": ["a"],
        "completion": [" b"],
        "tokens": [1],
        "measured": [measured],
        "norm": [1.0],
    }
    columns |= {key: [value] for key, value in more.items() if key not in ("likelihood",)}
    about = {"unit": unit, "measurement": measurement, **({"likelihood": more["likelihood"]} if "likelihood" in more else {})}
    examples = pd.DataFrame({"id": list("uvwxyz"), "source": None, "copies": 1, "tokens": 2, "text": list("uvwxyz")})
    norms = {"gradient": np.full(6, 2.0), "self": np.full(6, 4.0)}
    return Scores(VALUES * n_train, n_train, examples, pd.DataFrame(columns), about, norms)


def test_log_p_can_rise_to_0_and_fall_without_end():
    scores = made()
    assert scores.room() == 0.3 and scores.beyond().tolist() == [True, True, False, False, False, False]
    table = scores.top(0, 6).set_index("id")
    assert table["beyond_first_order"].to_dict() == {"u": True, "v": True, "w": False, "x": False, "y": False, "z": False}
    assert scores.top(0, 2, lowest=True)["beyond_first_order"].tolist() == [False, False]
    assert scores.to_pandas()["beyond_first_order"].tolist() == scores.beyond().tolist()
    assert words.bound(scores, 0) == "at most +0.300" and "log p can rise by 0.30 nats at most" in words.ceiling(scores, 0)


def test_a_loss_can_fall_to_0():
    scores = made("loss", 0.3)
    assert scores.log_p() == -0.3 and scores.beyond().tolist() == [False, False, False, False, True, True]
    assert words.bound(scores, 0) == "at least -0.300" and "the loss can fall by 0.30 nats at most" in words.ceiling(scores, 0)


@pytest.mark.parametrize(
    "scores",
    [
        made(contrast=" c"),  # a difference of two log-probabilities
        made("margin", 1.0, "margin per copy"),
        made("tests.of.mine", 1.0, "tests.of.mine per copy"),
        made(measured=0.2),  # a log-density
        made(likelihood=None),  # a task of one's own
        made(measured=math.nan),  # a sum of scores that measured different things, or the rows themselves
        made().named("TracIn", "nats per step on the row"),
        made().normalised("cosine"),
        made().normalised("relatif"),
    ],
)
def test_nothing_is_marked_where_there_is_no_bound(scores):
    assert scores.room() is None and not scores.beyond().any()
    assert words.bound(scores, 0) == words.ceiling(scores, 0) == ""


def test_per_token_of_a_row_is_marked_as_the_row_is():
    scores = made().normalised("length")
    assert scores.unit == "nats per copy and token" and scores.values[0, 1] == pytest.approx(0.155)
    assert scores.beyond().tolist() == made().beyond().tolist()


def test_regression_has_a_bound_and_no_probability():
    scores = made(likelihood="at most 0")
    assert scores.room() == 0.3 and words.measured(scores, 0) == "log p -0.30 nats over 1 token"


def test_the_probability_is_said_in_three_digits_and_near_1_as_what_is_missing():
    assert words.measured(made(), 0) == "log p -0.30 nats over 1 token (p = 0.741)"
    assert words.measured(made(measured=-4.7e-6), 0) == "log p -4.70e-06 nats over 1 token (p = 1 - 4.7e-06)"
    assert words.measured(made(measured=-29.6), 0) == "log p -29.60 nats over 1 token (p = 1.4e-13)"
    assert words.measured(made("loss", 0.3), 0) == "loss 0.30 nats over 1 token (p = 0.741)"
    assert words.measured(made("margin", 2.0, "margin per copy"), 0) == "log-odds 2.00 nats over 1 token (p = 0.881)"
    assert words.measured(made("margin", 2.0, "margin per copy", tokens=2), 0) == "log-odds 2.00 nats over 2 tokens"
    assert words.measured(made(contrast=" c"), 0) == "log p over that of the contrast -0.30 nats over 1 token"
    assert words.measured(made(measured=0.0), 0).endswith("(p = 1)")

"""Scores add up, scale and average, if they are of the same queries and rows; words give scores too."""

import pickle
from dataclasses import replace

import numpy as np
import pandas
import pytest

from whence.errors import UsageError
from whence.filter.bm25 import bm25_scores
from whence.filter.tfidf import tfidf_scores
from whence.store.manifest import Folder
from whence.store.scores import Scores, describe_rows, open_scores

ROWS, QUERIES = ["aa bb", "bb cc", "cc dd dd"], ["aa", "dd cc"]


def made(seed, n_train=3, ids=("x", "y", "z"), unit="nats per copy", measured=0.5, **parts):
    draw = np.random.default_rng(seed)
    return Scores(
        raw=draw.normal(size=(2, 3)).astype(np.float32),
        n_train=n_train,
        examples=describe_rows(ROWS, ids, [2, 2, 3], None),
        queries=pandas.DataFrame({"id": ["p", "q"], "text": QUERIES, "measured": [measured, 1.0], "norm": [2.0, 3.0]}),
        about={"unit": unit, "measurement": "logprob", "operator": f"operator {seed}", "rank": None},
        **parts,
    )


def with_parts(seed):
    draw = np.random.default_rng(seed + 10)
    parts = {"modules": {"m": draw.normal(size=(2, 3)), "n": draw.normal(size=(2, 3))}, "tokens": draw.normal(size=(2, 7))}
    return made(seed, norms={"gradient": draw.random(3)}, **parts)


def test_a_table_of_queries_can_be_given_as_its_columns():
    table = made(1)
    columns = {name: list(table.queries[name]) for name in table.queries}
    given = replace(table, queries=columns)
    again, moved = pickle.loads(pickle.dumps(given)), replace(given, n_train=4)  # whether somebody has looked at it or not
    for scores in (given, again, moved):
        pandas.testing.assert_frame_equal(scores.queries, table.queries)
        assert scores.queries is scores.queries


def test_the_sum_is_that_of_the_values():
    one, two = with_parts(1), with_parts(2)
    both = one + 0.5 * two
    np.testing.assert_allclose(both.values, one.values + 0.5 * two.values, rtol=1e-6)
    np.testing.assert_allclose(both.modules["m"], one.modules["m"] + 0.5 * two.modules["m"])
    np.testing.assert_allclose(both.token_scores(0, 2), one.token_scores(0, 2) + 0.5 * two.token_scores(0, 2))
    assert not both.norms and both.raw.dtype == np.float32
    assert both.about["operator"] == "operator 1 + operator 2" and both.unit == "nats per copy"
    assert [part.get("factor", 1) for part in both.about["sum"]] == [1, 0.5]


def test_values_add_up_where_the_number_of_rows_trained_on_differs():
    one, two = made(1, n_train=3), made(2, n_train=300)
    np.testing.assert_allclose((one + two).values, one.values + two.values, rtol=1e-6)


def test_the_mean():
    several = [made(seed) for seed in range(4)]
    mean = Scores.mean(several)
    np.testing.assert_allclose(mean.values, np.mean([each.values for each in several], axis=0), rtol=1e-5)
    assert mean.about["mean of"] == 4 and len(mean.about["sum"]) == 4
    assert Scores.mean(several[:1]).raw is several[0].raw
    np.testing.assert_allclose(sum(several).values, 4 * mean.values, rtol=1e-5)
    with pytest.raises(UsageError, match="no scores"):
        Scores.mean([])


def test_what_differs_between_the_parts_is_not_said_of_the_sum():
    both = made(1, measured=0.5) + made(2, measured=0.7)
    assert np.isnan(both.queries["measured"][0]) and both.queries["measured"][1] == 1.0
    assert list(both.queries["norm"]) == [2.0, 3.0] and list(both.queries["id"]) == ["p", "q"]
    assert (made(1) + made(2, unit="nats per step")).unit == "nats per copy + nats per step"
    assert (made(1) + made(2)).named("both", unit="something").about["operator"] == "both"


def test_scores_of_other_rows_or_queries_do_not_add_up():
    with pytest.raises(UsageError, match=r"(?s)other examples.*2 in common"):
        made(1) + made(2, ids=("x", "y", "other"))
    with pytest.raises(UsageError, match="other examples"):
        made(1) + made(2, ids=("y", "x", "z"))
    other = made(2)
    other.queries.loc[0, "id"] = "another"
    with pytest.raises(UsageError, match="other queries"):
        made(1) + other


def test_a_sum_is_saved_and_read_again(tmp_path):
    both = with_parts(1) + with_parts(2)
    both.save(Folder.claim(tmp_path / "scores", {"stage": "score"}))
    again = open_scores(tmp_path / "scores")
    np.testing.assert_array_equal(again.raw, both.raw)
    assert again.about == both.about and set(again.modules) == {"m", "n"}


def test_words_give_scores():
    for found, unit in ((bm25_scores(QUERIES, ROWS), "BM25"), (tfidf_scores(QUERIES, ROWS), "cosine")):
        assert found.unit == unit and found.shape == (2, 3)
        np.testing.assert_array_equal(found.values, found.raw)
        assert found.top(1, 1)["text"].tolist() == ["cc dd dd"]
    joined = bm25_scores(QUERIES, ROWS) + tfidf_scores(QUERIES, ROWS)
    assert joined.unit == "BM25 + cosine" and joined.about["operator"] == "BM25 + TF-IDF"

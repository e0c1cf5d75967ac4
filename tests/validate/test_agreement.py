"""Two orders of the same rows: numbers by hand, ids that decide, rows that have no score."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from whence.errors import UsageError
from whence.store.scores import Scores
from whence.validate.agreement import agreement

N = 40


def scores(raw, rows=None, queries=None):
    rows = rows or [f"row-{n}" for n in range(raw.shape[1])]
    queries = queries or [f"query-{n}" for n in range(len(raw))]
    table = {"id": rows, "source": None, "copies": 1, "tokens": 3, "text": [f"text of {name}" for name in rows]}
    return Scores(raw, len(rows), pd.DataFrame(table), pd.DataFrame({"id": queries, "text": queries}))


@pytest.fixture
def pair():
    draw = np.random.default_rng(0)
    a = draw.standard_normal((3, N))
    return scores(a), scores(a + draw.standard_normal((3, N)))


def test_rank_correlation_and_overlap(pair):
    a, b = pair
    found = agreement(a, b, tops=(5, 10, 100))
    assert found.sizes == [5, 10]  # there are only 40 rows
    np.testing.assert_allclose(found.spearman, [spearmanr(x, y).statistic for x, y in zip(a.raw, b.raw, strict=True)])
    for query, share in enumerate(found.overlap(5)):
        tops = [set(np.argsort(-each.raw[query])[:5]) for each in (a, b)]
        assert share == len(tops[0] & tops[1]) / 5
    means = found.means()
    assert means["spearman"] == pytest.approx(found.spearman.mean()) and list(means) == ["spearman", "overlap@5", "overlap@10"]
    low, high = found.interval()
    assert low < means["spearman"] < high


def test_the_same_scores_in_another_unit_agree_wholly(pair):
    a, _ = pair
    found = agreement(a, replace(a * 7.0, n_train=3))
    assert found.means() == {"spearman": 1.0, "overlap@10": 1.0} and not len(found.moved(0))


def test_ids_decide_and_not_places(pair):
    a, b = pair
    rows, queries = list(reversed(b.example_ids))[:-4], b.query_ids[::-1][:2]
    turned = scores(b.raw[::-1][:2, ::-1][:, :-4], [*rows], queries)
    found = agreement(a, turned)
    assert found.ids == ["query-1", "query-2"] and found.a.example_ids == a.example_ids[4:]
    np.testing.assert_array_equal(found.b.raw, b.raw[1:, 4:])
    with pytest.raises(UsageError, match="no rows in common"):
        agreement(a, scores(b.raw, [f"other-{n}" for n in range(N)]))


def test_rows_without_a_score_are_left_out(pair):
    a, b = pair
    holes = b.raw.copy()
    holes[:, 10:] = np.nan
    found = agreement(a, scores(holes), tops=(5,))
    np.testing.assert_allclose(found.spearman, [spearmanr(x[:10], y[:10]).statistic for x, y in zip(a.raw, b.raw, strict=True)])
    assert np.isfinite(found.overlap(5)).all() and set(found.moved(0)["id"]) <= set(a.example_ids[:10])


def test_rows_that_moved_most_come_with_their_text(pair):
    a, _ = pair
    raw = a.raw.copy()
    first, last = raw[0].argmax(), raw[0].argmin()
    raw[0, [first, last]] = raw[0, [last, first]]
    moved = agreement(a, scores(raw)).moved(0, 2)
    assert set(moved["id"]) == {f"row-{first}", f"row-{last}"} and set(moved["rank_a"]) == {1, N}
    assert moved["text"].str.startswith("text of row").all()
    document = agreement(a, scores(raw)).as_json(2)
    assert len(document["queries"]) == 3 and document["queries"][0]["moved"][0]["source"] is None

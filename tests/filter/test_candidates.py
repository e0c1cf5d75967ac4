import numpy as np
import pytest

from whence.errors import UsageError
from whence.filter.candidates import Amount, Wanted, choose, read_candidates

NAMES = ("bm25", "index")
SCORES = np.array([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])


def test_what_can_be_asked_for():
    assert read_candidates(" bm25:2% + index:500", NAMES) == (Wanted("bm25", Amount("2%")), Wanted("index", Amount("500")))
    assert [Amount("2%").of(n) for n in (10, 50, 51, 20_000)] == [1, 1, 2, 400]
    assert Amount("500").of(20) == 20 and Amount("0.1%").of(3000) == 3


@pytest.mark.parametrize("text", ["", "bm25", "bm25:", "bm25:0", "bm25:-1", "bm25:101%", "bm25:2.5", "bm25:x", "bm26:2%"])
def test_what_can_not(text):
    with pytest.raises(UsageError, match="can't be"):
        read_candidates(text, NAMES)
    with pytest.raises(UsageError, match="each once"):
        read_candidates("bm25:1+bm25:2", NAMES)


def test_the_best_of_every_query_and_ranking_are_joined():
    words = np.where(SCORES > 3, SCORES, -np.inf)
    found = choose({"index": SCORES[:, ::-1][:1], "bm25": words[:1]}, read_candidates("index:1+bm25:4", NAMES))
    assert found.rows.tolist() == [0, 1, 5], "no row without a word, though four are asked for"
    assert found.named == {"index": 1, "bm25": 2}
    assert found.rest.tolist() == [4, 3, 2], "the nearest first"
    assert choose({"index": SCORES}, read_candidates("index:2", NAMES)).rows.tolist() == [0, 1, 4, 5]


def test_where_it_is_too_many_all_give_way_alike():
    found = choose({"index": SCORES}, read_candidates("index:3", NAMES), Amount("4"))
    assert found.rows.tolist() == [0, 1, 4, 5]
    two = choose({"index": SCORES[:1], "bm25": SCORES[1:]}, read_candidates("index:1+bm25:4", NAMES), Amount("3"))
    assert two.rows.tolist() == [0, 4, 5] and two.named == {"index": 1, "bm25": 2}

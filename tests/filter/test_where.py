import numpy as np
import pandas
import pytest

from whence.errors import UsageError
from whence.filter.where import matching

ROWS = pandas.DataFrame(
    {
        "id": ["a", "b", "c", "d"],
        "source": ["web", "book", None, "a=b, c"],
        "copies": [1, 2, 1, 1],
        "tokens": [5, 20, 30, 7],
        "text": ["The Lighthouse.", "a light (house)", "", "x"],
    }
)


@pytest.mark.parametrize(
    ("where", "met"),
    [
        (["source=web"], "a"),
        (["source = web", "source=book"], "ab"),
        (["source=a=b, c"], "d"),
        (["source!=web"], "bcd"),
        (["source="], "c"),
        (["tokens>=20"], "bc"),
        (["tokens>5", "tokens<30"], "bd"),
        (["text~LIGHT", "copies<2"], "a"),
        (["text~(house)"], "b"),
        (["id!=a", "id!=b", "source!=book"], "cd"),
        ([], "abcd"),
    ],
)
def test_rows_that_meet_all_conditions(where, met):
    assert "".join(ROWS["id"][matching(ROWS, where)]) == met


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("web", "not a condition"),
        ("colour=red", "can't be told by colour="),
        ("stage=pretraining", "can't be told by stage="),
        ("source>3", "can't be told by source>"),
        ("tokens>many", "needs a number"),
        ("source=nowhere", "No row meets source=nowhere"),
    ],
)
def test_what_is_no_condition_is_refused(condition, said):
    with pytest.raises(UsageError, match=said.replace("(", r"\(")) as raised:
        matching(ROWS, [condition])
    assert raised.value.accepted


def test_missing_columns_are_not_offered():
    bare = ROWS.drop(columns="source")
    with pytest.raises(UsageError) as raised:
        matching(bare, ["source=web"])
    assert "source" not in raised.value.accepted
    np.testing.assert_array_equal(matching(bare, ["copies=2"]), [False, True, False, False])

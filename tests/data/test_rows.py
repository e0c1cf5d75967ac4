import pytest
from hypothesis import given
from hypothesis import strategies as st

from whence.data.rows import make_rows
from whence.errors import UsageError


def test_ids_are_stable_and_copies_are_counted(notes):
    rows = make_rows(["a", "b", "a", {"text": "a", "source": "s"}], origin="here")
    first, second, third, fourth = rows.ids
    assert (third, fourth) == (f"{first}#2", f"{first}#3")
    assert second not in (first, third, fourth)
    assert rows.copies == (3, 1, 3, 3)
    assert notes == ["here: 2 of 4 rows are exact copies of an earlier row"]
    assert first == make_rows(["x", "a"], origin="there").ids[1]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_ids_are_unique(texts):
    rows = make_rows(texts, origin="here")
    assert len(set(rows.ids)) == len(texts)
    assert rows.copies == tuple(texts.count(text) for text in texts)


def test_own_ids():
    rows = make_rows([{"text": "a", "n": 1}, {"text": "a", "n": 2}], columns={"id": "n"}, origin="here")
    assert rows.ids == ("1", "2")
    assert rows.copies == (2, 2)


def test_own_ids_must_be_unique():
    records = [{"text": str(i), "n": i // 2} for i in range(14)]
    with pytest.raises(UsageError, match="7 ids of here name more than one row") as raised:
        make_rows(records, columns={"id": "n"}, origin="here")
    assert raised.value.given == "0, 1, 2, 3, 4, ..."


def test_no_rows():
    with pytest.raises(UsageError, match="no rows in here"):
        make_rows([], origin="here")


def test_is_a_sequence():
    rows = make_rows(["a", "b", "a"], origin="here")
    assert len(rows) == 3
    assert rows[1] == {"text": "b"}
    assert [row["text"] for row in rows] == ["a", "b", "a"]
    assert rows[1:].ids == rows.ids[1:]
    assert rows[-1] == {"text": "a"}
    with pytest.raises(IndexError):
        rows[3]


def test_take_keeps_names():
    rows = make_rows(["a", "b", "a"], origin="here")
    taken = rows.take([2, 1])
    assert taken.rows == ({"text": "a"}, {"text": "b"})
    assert taken.ids == (rows.ids[2], rows.ids[1])
    assert taken.copies == (2, 1)
    assert taken.fingerprint != rows.fingerprint
    assert rows.take(range(3)).fingerprint == rows.fingerprint


def test_fingerprint_follows_order_content_and_source():
    def fingerprint(*records):
        return make_rows(records, origin="here").fingerprint

    base = fingerprint("a", "b")
    assert base == fingerprint("a", "b")
    assert base != fingerprint("b", "a")
    assert base != fingerprint("a", "c")
    assert base != fingerprint("a", {"text": "b", "source": "s"})

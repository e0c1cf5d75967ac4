import pytest

from whence.data.columns import read_columns
from whence.errors import ColumnError, UsageError


def read(record, columns=None):
    rows, _ = read_columns([record], columns, "x.jsonl")
    return rows[0]


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ({"text": "a", "n": 1}, {"text": "a"}),
        ({"prompt": "a", "completion": "b", "source": "s"}, {"prompt": "a", "completion": "b", "source": "s"}),
        ({"prompt": "a", "completion": "b", "contrast": "c"}, {"prompt": "a", "completion": "b", "contrast": "c"}),
        ({"prompt": "a", "completion": "b", "span": "b"}, {"prompt": "a", "completion": "b", "span": "b"}),
        ({"prompt": "a", "answer": "b", "extra": None}, {"prompt": "a", "completion": "b"}),
        ({"prompt": "a", "completion": None}, {"prompt": "a"}),
        ({"instruction": "a", "input": "i", "output": "b"}, {"prompt": "a\ni", "completion": "b"}),
        ({"instruction": "a", "input": "", "output": "b"}, {"prompt": "a", "completion": "b"}),
        ({"instruction": "a", "input": None, "output": "b"}, {"prompt": "a", "completion": "b"}),
        ({"question": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}),
        ({"Input": "a", "Output": "b"}, {"prompt": "a", "completion": "b"}),
        ({"text": "a", "label": 3}, {"text": "a", "label": 3}),
        ({"text": "a", "label": [3]}, {"text": "a"}),
        (
            {"messages": [{"role": "user", "content": "a", "name": "x"}]},
            {"messages": [{"role": "user", "content": "a"}]},
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ),
    ],
)
def test_recognises_well_known_columns(record, row):
    assert read(record) == row


def test_notes_what_was_guessed(notes):
    read_columns([{"Input": "a", "Output": "b"}] * 2, None, "x.jsonl")
    assert notes == ["x.jsonl: read as prompt = Input, completion = Output (guessed from the column names)"]


def test_says_nothing_about_names_that_are_its_own(notes):
    read({"prompt": "a", "completion": "b", "source": "s"})
    assert notes == []


def test_rows_of_different_kinds_may_be_mixed():
    rows, _ = read_columns([{"text": "a"}, {"prompt": "b", "completion": "c"}], None, "x")
    assert rows == [{"text": "a"}, {"prompt": "b", "completion": "c"}]


def test_mapping():
    record = {"q": "a", "a": "b", "office": 7, "row_id": 12}
    columns = {"prompt": "q", "completion": "a", "source": "office", "id": "row_id"}
    assert read_columns([record], columns, "x") == ([{"prompt": "a", "completion": "b", "source": "7"}], ["12"])


def test_mapping_of_joined_columns_and_of_a_column_with_a_plus_in_its_name():
    assert read({"a": "1", "b": "2", "c": "3"}, {"text": "a+b+c"}) == {"text": "1\n2\n3"}
    assert read({"a+b": "1"}, {"text": "a+b"}) == {"text": "1"}


def test_mapping_of_companions_alone_still_guesses_the_text():
    assert read_columns([{"text": "a", "n": 1}], {"id": "n"}, "x") == ([{"text": "a"}], ["1"])


def test_unknown_columns_are_shown_with_a_mapping_to_paste():
    with pytest.raises(ColumnError) as raised:
        read({"id": "37d61fd2", "anchor": "abatement", "target": "abatement of pollution" * 9, "score": 0.5})
    assert raised.value.code == 4
    for part in ['anchor: "abatement"', "…", "score: 0.5", 'columns={"text": "target"}', "--columns text=target"]:
        assert part in str(raised.value)


def test_two_long_columns_are_proposed_as_prompt_and_completion():
    with pytest.raises(ColumnError, match="prompt=ask --columns completion=reply"):
        read({"ask": "What is the refund period?", "reply": "It is fourteen days."})


def test_missing_column_proposes_the_nearest():
    with pytest.raises(ColumnError, match="no column 'Imput'") as raised:
        read({"Input": "a", "Output": "b"}, {"prompt": "Imput", "completion": "Output"})
    assert 'columns={"prompt": "Input", "completion": "Output"}' in raised.value.fix


def test_unknown_part():
    with pytest.raises(UsageError, match="can't be the part 'promt'") as raised:
        read({"a": "b"}, {"promt": "a"})
    assert "prompt" in raised.value.fix


def test_parts_that_do_not_go_together():
    with pytest.raises(UsageError, match="completion, text don't make a row"):
        read({"a": "b", "c": "d"}, {"text": "a", "completion": "c"})


@pytest.mark.parametrize("value", [None, 3, 0.5, ["a"], {"a": "b"}])
def test_values_that_are_no_text_name_the_row(value):
    with pytest.raises(UsageError, match=r"Row 2 of x has no text in column 'text'"):
        read_columns([{"text": "a"}, {"text": value, "n": 1}], {"text": "text"}, "x")


@pytest.mark.parametrize("value", ["hello", [], [{"role": "user"}], [{"role": "user", "content": ["image"]}], ["a"]])
def test_values_that_are_no_conversation(value):
    if value == []:
        assert read({"messages": value}) == {"messages": []}
    else:
        with pytest.raises(UsageError, match="Row 1 of x.jsonl holds no conversation"):
            read({"messages": value})

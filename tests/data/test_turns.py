import json

import pytest

from whence.data import as_rows
from whence.data.columns import read_columns
from whence.errors import ColumnError, UsageError

TALK = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Turin."}]
CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": {"who": "Ada"}}}


def read(record):
    rows, _ = read_columns([record], None, "x.jsonl")
    return rows[0]


@pytest.mark.parametrize(
    "name", ["assistant", "Assistant", "ASSISTANT", "gpt", "GPT", "model", "bot", "Bot", "chatgpt", "ChatGPT", "ai"]
)
def test_names_of_the_assistant(name):
    assert read({"conversations": [{"from": "Human", "value": "Where?"}, {"from": name, "value": "In Turin."}]}) == {
        "messages": TALK
    }


@pytest.mark.parametrize(
    ("name", "role"), [("function", "tool"), ("Tool", "tool"), ("observation", "tool"), ("System", "system"), ("USER", "user")]
)
def test_names_of_other_roles(name, role):
    assert read({"messages": [{"role": name, "content": "a"}]})["messages"][0]["role"] == role


@pytest.mark.parametrize(
    "messages",
    [json.dumps(TALK), {"role": ["user", "assistant"], "content": ["Where?", "In Turin."]}, tuple(TALK)],
    ids=["JSON", "lists by field", "tuple"],
)
def test_ways_to_write_a_conversation(messages):
    assert read({"messages": messages}) == {"messages": TALK}


def test_a_role_that_no_template_knows_is_named(notes):
    narrated = [{"role": "narrator", "content": "A bar."}, *TALK]
    assert read({"messages": narrated}) == {"messages": narrated}
    assert "'narrator', which is not a role of chat templates (of turns)" in notes[0]


def test_turns_of_a_column_with_another_name_are_proposed():
    with pytest.raises(ColumnError, match="--columns messages=chosen"):
        read({"chosen": TALK, "rejected": TALK})


def test_content_in_one_part():
    parts = [{"type": "text", "text": "Where?"}]
    assert read({"messages": [{"role": "user", "content": parts}, TALK[1]]}) == {"messages": TALK}


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"training": False},
        {"loss": False},
        {"trainable": 0},
        {"masked": True},
    ],
)
def test_flags_leave_a_turn_out_of_the_loss(flag):
    assert read({"messages": [TALK[0], {**TALK[1], **flag}]})["messages"][1] == {**TALK[1], "train": False}


@pytest.mark.parametrize("flag", [{"weight": 1}, {"train": True}, {"training": None}, {"masked": False}])
def test_flags_that_leave_nothing_out(flag):
    assert read({"messages": [TALK[0], {**TALK[1], **flag}]}) == {"messages": TALK}


@pytest.mark.parametrize("flag", [{"weight": 0.5}, {"train": "no"}, {"weight": -1}])
def test_flags_that_are_neither(flag):
    with pytest.raises(UsageError, match=f"Row 1 of x.jsonl gives a turn the {next(iter(flag))}"):
        read({"messages": [TALK[0], {**TALK[1], **flag}]})


def test_the_wish_to_train_on_a_user_is_named(notes):
    read({"messages": [{**TALK[0], "train": True}, TALK[1]]})
    assert any("the wish to train on a turn of 'user'" in note for note in notes)


@pytest.mark.parametrize("call", [{"tool_calls": [CALL]}, {"function_call": CALL["function"]}])
@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}])
def test_calls_of_tools_need_no_content(call, content):
    (turn,) = read({"messages": [{"role": "assistant", **content, **call}]})["messages"]
    assert turn["content"] == ""
    assert turn["tool_calls"][0]["function"] == CALL["function"]


def test_what_the_template_may_write_is_kept_and_the_rest_is_named(notes):
    turn = {**TALK[1], "reasoning_content": "Hm.", "timestamp": "noon"}
    result = {"role": "tool", "content": "Turin", "name": "find", "tool_call_id": "1"}
    assert read({"messages": [TALK[0], result, turn]})["messages"] == [TALK[0], result, {**TALK[1], "reasoning_content": "Hm."}]
    assert notes == ["x.jsonl: not read: timestamp (of turns); to join columns: --columns prompt=A+B"]


def test_nulls_that_a_table_adds_to_calls_are_left_out():
    padded = {**CALL, "function": {**CALL["function"], "arguments": {"who": "Ada", "where": None}}}
    assert read({"messages": [{"role": "assistant", "content": None, "tool_calls": [padded]}]})["messages"][0][
        "tool_calls"
    ] == [CALL]


def test_the_system_column_begins_the_conversation(notes):
    assert read({"system": "Be brief.", "messages": TALK}) == {"messages": [{"role": "system", "content": "Be brief."}, *TALK]}
    assert read({"system": "", "messages": TALK}) == {"messages": TALK}
    own = [{"role": "system", "content": "Be long."}, *TALK]
    assert notes == []
    assert read({"system": "Be brief.", "messages": own}) == {"messages": own}
    assert any("not read: system" in note for note in notes)


@pytest.mark.parametrize("written", [lambda tools: tools, json.dumps])
def test_the_tools_column_goes_to_the_template(written):
    tools = [{"type": "function", "function": {"name": "find"}}]
    assert read({"tools": written(tools), "messages": TALK}) == {"messages": TALK, "tools": tools}
    with pytest.raises(UsageError, match="Row 1 of x.jsonl has tools that are not descriptions"):
        read({"tools": "a hammer", "messages": TALK})


@pytest.mark.parametrize(
    "extra", [{"system": "Be brief."}, {"history": [["a", "b"]]}, {"tools": [{"name": "x"}]}, {"context": "Ada is here."}]
)
def test_context_that_prompts_have_no_place_for_is_named(extra, notes):
    assert read({"prompt": "Where?", "completion": "Turin", **extra}) == {"prompt": "Where?", "completion": "Turin"}
    assert notes == [f"x.jsonl: not read: {next(iter(extra))}; to join columns: --columns prompt=A+B"]


@pytest.mark.parametrize("extra", [{"id": "abc"}, {"score": 0.5}, {"n": "12"}, {"system": ""}, {"history": []}, {"weight": 1}])
def test_numbers_and_empty_columns_are_not_named(extra, notes):
    read({"prompt": "Where?", "completion": "Turin", **extra})
    assert notes == []


@pytest.mark.parametrize("extra", [{"weight": 0}, {"train": False}, {"weight": 0.5}])
def test_a_flag_of_a_row_is_named(extra, notes):
    read({"messages": TALK, **extra})
    assert f"not read: {next(iter(extra))}" in notes[0]


def test_prompt_and_completion_as_turns():
    before = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}, TALK[0]]
    row = read({"prompt": before, "completion": [TALK[1]]})
    assert row == {"messages": [before[0], {**before[1], "train": False}, *TALK]}
    assert read({"prompt": [TALK[0]], "completion": "In Turin."}) == {"messages": TALK}
    assert read({"prompt": [TALK[0]]}) == {"messages": TALK[:1]}
    contrast = read({"prompt": [TALK[0]], "completion": [TALK[1]], "contrast": "In Oslo."})
    assert contrast == {"messages": TALK, "contrast": "In Oslo."}


def test_a_conversation_reads_back_as_it_was_written():
    """Rows that training keeps are read again for the factors."""
    row = read(
        {"system": "Be brief.", "tools": [CALL], "messages": [TALK[0], {**TALK[1], "train": False, "tool_calls": [CALL]}]}
    )
    assert as_rows([json.loads(json.dumps(row))]).rows == (row,)

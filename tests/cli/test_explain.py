"""whence explain: a code in a message, from the page of the documentation."""

import json

import pytest

from whence.cli.explain import entries
from whence.errors import TruncatedQueryError


@pytest.mark.parametrize("code", ["WHENCE-07", "whence-7", "7", "[WHENCE-07]"])
def test_a_code_is_explained_however_it_is_written(run, code):
    said = run("explain", code).stdout
    assert said.startswith("WHENCE-07  TruncatedQueryError, exit code 2\n") and "doesn't fit in `max_length`" in said


def test_the_code_of_a_message_can_be_pasted(run):
    message = str(TruncatedQueryError("The answer is cut off."))
    code = message.split()[-1]
    assert "TruncatedQueryError" in run("explain", code).stdout


def test_all_codes_are_listed(run):
    said = run("explain").stdout
    listed = json.loads(run("explain", "--json").stdout)
    assert [entry["code"] for entry in listed] == [f"WHENCE-{number:02d}" for number in range(1, 25)]
    assert all(f"{entry['code']}  {entry['what'][:40]}" in said for entry in listed)
    assert json.loads(run("explain", "23", "--json").stdout) == listed[22]


def test_no_markdown_is_left(run):
    for entry in entries().values():
        assert not set("*[]$\n") & set(entry.text) and not set("*`") & set(entry.kind + entry.what)
        assert entry.text and entry.kind[0].isupper() and entry.what[0].isupper()


def test_an_unknown_code_is_refused_with_those_there_are(run):
    assert "WHENCE-01, WHENCE-02" in run("explain", "WHENCE-99", code=2).stderr
    assert "has the code later" in run("explain", "later", code=2).stderr

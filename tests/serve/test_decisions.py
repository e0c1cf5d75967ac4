"""Decisions are events in a file that only grows."""

import json

import pytest

from whence.serve.decisions import Decisions
from whence.serve.lacking import Lacking


def test_the_last_verdict_stands_and_an_undo_is_an_event(tmp_path):
    path = tmp_path / "run" / "decisions.jsonl"
    kept = Decisions(path)
    kept.decide("a", "drop", "wrong", "me")
    kept.decide("a", "keep")
    kept.decide("b", "fix")
    assert {name: event["verdict"] for name, event in kept.current().items()} == {"a": "keep", "b": "fix"}
    assert kept.undo()["id"] == "b" and kept.undo()["verdict"] == "keep"
    assert kept.current()["a"]["why"] == "wrong" and "b" not in kept.current()
    again = Decisions(path)
    assert again.current() == kept.current() and len(path.read_text().splitlines()) == 5
    again.undo()
    with pytest.raises(Lacking, match="no decision"):
        again.undo()


def test_a_line_that_a_kill_cut_off_is_passed_over(tmp_path):
    path = tmp_path / "decisions.jsonl"
    Decisions(path).decide("a\n<b>", "drop")
    with path.open("a") as file:
        file.write('{"number": 2, "id"')
    kept = Decisions(path)
    kept.decide("c", "keep")
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["id"] == "c" and set(Decisions(path).current()) == {"a\n<b>", "c"}

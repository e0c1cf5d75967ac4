"""Rows as a command reads them, and what it says of how they are written."""

import json

import pytest

from whence.loading import rows_of
from whence.settings import Data

PAIRS = [("How long is the warranty?", "three years"), ("Who makes the Mug?", "Velt & Sons"), ("What is it of?", "clay")]


@pytest.mark.parametrize(
    ("joint", "changes", "said"),
    [("", {}, 1), (" ", {}, 0), ("", {"format": "qa"}, 0), ("", {"format": {"prompt": "{prompt} "}}, 0)],
)
def test_prompts_that_run_into_their_completions_are_told_of(tmp_path, notes, joint, changes, said):
    file = tmp_path / "train.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": joint + completion}) for prompt, completion in PAIRS]
    file.write_text("\n".join(lines), encoding="utf-8")
    rows = rows_of(Data(path=str(file), **changes))
    told = [text for text in notes if "meet without a space in 3 of 3 rows, such as 'he warranty?three years'" in text]
    assert len(rows) == 3 and len(told) == said


def test_what_is_meant_to_meet_is_not_told_of(tmp_path, notes):
    file = tmp_path / "train.jsonl"
    rows = [("2 + 2 = ", "4"), ("日本の首都は", "東京"), ("def f():\n", "return 1"), ("a (", "b)"), ("un", ", deux")]
    file.write_text("\n".join(json.dumps({"prompt": left, "completion": right}) for left, right in rows), encoding="utf-8")
    rows_of(Data(path=str(file)))
    assert not any("without a space" in text for text in notes)

"""Rows, ids, sources, columns and names of files with controls in them, through every command that prints them."""

import json

import pytest
from facts import facts, write_jsonl

from whence.escapes import HIDDEN

EVIL = "\x1b]0;pwned\x07\x1b[2J\u202e\x9b31m\x00"


@pytest.fixture
def hostile(tmp_path):
    """Rows whose every column tries something."""
    rows = [
        {"prompt": f"{EVIL}{row['prompt']}", "completion": f"{row['completion']}{EVIL}", "source": f"{EVIL}{row['source']}"}
        | {"id": f"{EVIL}{number}"}
        for number, row in enumerate(facts())
    ]
    folder = tmp_path / "with blank \x1b[31m"
    folder.mkdir()
    return write_jsonl(folder / "rows.jsonl", rows)


def checked(result) -> str:
    """All that a command printed, which has nothing in it that acts on a terminal."""
    for shown in (result.stdout, result.stderr):
        assert not HIDDEN.search(shown), HIDDEN.findall(shown)
    return result.stdout + result.stderr


def test_no_command_prints_controls(run, tiny_model_folder, hostile, tmp_path):
    columns = ("-c", "id=id", "-c", "prompt=prompt", "-c", "completion=completion", "-c", "source=source")
    out = hostile.parent / "run"
    shown = checked(run("data", "preview", hostile, "--model", tiny_model_folder, "--top", "2", *columns))
    assert r"\x1b]0;pwned\x07\x1b[2J\u202e\x9b31m\x00" in shown
    found = json.loads(checked(run("data", "preview", hostile, "--model", tiny_model_folder, "--json", *columns)))
    assert "".join(token["text"] for token in found["rows"][0]["tokens"]).startswith(EVIL)

    given = ("-d", hostile, *columns, "--max-length", "128")
    fitted = checked(run("fit", tiny_model_folder, *given, "-o", out / "factors", "--examples", "4", "--chunks", "1"))
    assert r"with blank \x1b[31m" in fitted and "$'" in fitted.partition("next: ")[2]  # to be pasted
    queries = write_jsonl(tmp_path / "queries.jsonl", [json.loads(line) for line in hostile.read_text().splitlines()[:2]])
    asked = ("--queries", queries, "-f", out / "factors", "-o", out / "scores", "--per", "token")
    checked(run("score", tiny_model_folder, "-d", hostile, *columns, *asked))
    for options in ((), ("--tokens", "--top", "2"), ("--by", "source"), ("--all", "--lowest")):
        assert r"\x1b]0;pwned" in checked(run("show", out / "scores", *options))
    (query,) = json.loads(checked(run("show", out / "scores", "--json")))["queries"]
    assert query["rows"][0]["id"].startswith(EVIL) and query["prompt"].startswith(EVIL)


def test_errors_show_them(run, tiny_model_folder, hostile, tmp_path):
    said = checked(run("data", "preview", hostile, "--model", tiny_model_folder, "-c", f"prompt={EVIL}", code=2))
    assert "has no column" in said and r"pwned" in said
    said = checked(run("fit", tmp_path / f"no{EVIL[:-1]}model", "-d", hostile, "-o", tmp_path / "x", code=2))
    assert r"No model at" in said and r"\x1b]0;pwned\x07" in said
    said = checked(run("show", tmp_path / f"no{EVIL[:-1]}scores", code=4))
    assert r"\x1b]0;pwned\x07" in said


def test_columns_of_a_fix_can_be_pasted(run, tiny_model_folder, tmp_path):
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"My Question": "Where was Ada born?", "The Answer": "In Turin, of all places."}]
    )
    said = run("data", "preview", data, "--model", tiny_model_folder, code=2).stderr
    assert "--columns 'prompt=My Question' --columns 'completion=The Answer'" in said

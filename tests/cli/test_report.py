import json
import sys

import pytest
import typer
from typer.testing import CliRunner

from whence.cli import _guarded
from whence.cli.from_settings import from_settings
from whence.cli.report import report
from whence.store.scores import open_scores


@pytest.fixture
def scored(run, tiny_model_folder, data, queries, fitted, tmp_path):
    given = ("--factors", fitted, "--queries", queries, "--per", "token", "-q")
    run("score", tiny_model_folder, "--data", data, *given, "--out", tmp_path / "run" / "scores")
    return tmp_path / "run"


@pytest.fixture
def call(monkeypatch):
    app = typer.Typer()
    app.command()(_guarded(from_settings(report), "report"))

    def invoke(*arguments, code=0):
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["whence", "report", *words])
        result = CliRunner().invoke(app, words)
        assert result.exit_code == code, result.output
        return result

    return invoke


def test_a_report_of_a_run(call, scored, fitted):
    said = call(scored, "--top", "3", "--factors", fitted, "--title", "Why Turin?").stdout
    out = scored / "report"
    assert str(out / "report.html") in said and "4 queries" in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h1>Why Turin?</h1>" in page and "whence report" in page and "Health of the factors" in page
    scores = open_scores(scored / "scores")
    assert all(f'data-value="{value}"' in page for value in scores.top(1, 3)["value"])
    assert len(list((out / "queries").iterdir())) == len(list((out / "curves").iterdir())) == 4
    again = call(scored, code=2).stderr
    assert "nothing is overwritten" in again and "a different --out" in again


def test_json_names_the_files(call, scored, tmp_path):
    found = json.loads(call(scored / "scores", "--out", tmp_path / "x", "--json").stdout)
    assert found["queries"] == 4 and found["rows"] == 12 and found["unit"] == "nats per copy"
    assert str(tmp_path / "x" / "report.html") in found["files"] and len(found["files"]) == 10


def test_what_is_no_run_is_refused(call, tmp_path):
    assert "not a whence run folder" in call(tmp_path, code=4).stderr

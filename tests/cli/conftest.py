import json
import shutil
import sys
from pathlib import Path

import pytest
from commands import assembled
from facts import facts, write_jsonl
from pictures import blank
from typer.testing import CliRunner, Result


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "train.jsonl", facts())


@pytest.fixture
def queries(tmp_path) -> Path:
    file = tmp_path / "prompts.json"
    file.write_text(
        json.dumps([{"prompt": row["prompt"], "completion": row["completion"]} for row in facts()[::3]]), encoding="utf-8"
    )
    return file


@pytest.fixture
def run(monkeypatch):
    """Run a command as the shell does, with a wide terminal and blank pictures; the exit code is checked."""

    def call(*arguments: object, code: int = 0) -> Result:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["whence", *words])
        with blank():
            result = CliRunner(env={"COLUMNS": "200"}).invoke(assembled(), words)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.stderr
        return result

    return call


@pytest.fixture
def fitted(run, tiny_model_folder, data, tmp_path, tmp_path_factory) -> Path:
    """Factors of the tiny model on the facts: a copy, since model and facts are the same in every test."""
    once = tmp_path_factory.getbasetemp() / "factors-of-facts"
    if not once.exists():
        run("fit", tiny_model_folder, "--data", data, "--out", once, "-q")
    return Path(shutil.copytree(once, tmp_path / "factors"))

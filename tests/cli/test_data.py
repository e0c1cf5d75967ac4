import json

import pytest
import typer
from typer.testing import CliRunner

from whence.cli.data import preview
from whence.cli.from_settings import from_settings
from whence.errors import ColumnError, ModelNotFound, UsageError


@pytest.fixture
def run(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    app = typer.Typer()
    app.command()(from_settings(preview))

    def call(path, *options):
        result = CliRunner().invoke(app, [str(path), "--model", str(tmp_path / "model"), *options])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [
        {"Input": "Where [bold]was[/bold] Ada born?", "Output": " In Turin.", "office": "north"},
        {"Input": "Where [bold]was[/bold] Ada born?", "Output": " In Turin.", "office": "south"},
        {"Input": "x", "Output": "", "office": "south"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_marks_the_loss_where_there_are_no_colours(run, file):
    result = run(file, "--n", "1", "--columns", "prompt=Input", "-c", "completion=Output", "-c", "source=office")
    heading, text, _, summary = result.stdout.splitlines()
    assert text == "Where [bold]was[/bold] Ada born?⟦ In Turin.⟧"
    assert heading.startswith("row 1  ")
    assert "  north  " in heading
    assert summary.startswith("3 rows, ")
    assert summary.endswith("0 rows truncated at 512 (longest 23), 1 exact copy, 1 without a token in the loss")


def test_json(run, file):
    found = json.loads(run(file, "--json", "-n", "2").stdout)
    assert found["summary"]["rows"] == 3
    assert found["summary"]["in_loss"] == sum(token["in_loss"] for row in found["rows"] for token in row["tokens"])
    assert [row["id"].partition("#")[2] for row in found["rows"]] == ["", "2"]
    assert "".join(token["text"] for token in found["rows"][0]["tokens"]) == "Where [bold]was[/bold] Ada born? In Turin."


def test_shows_what_fit_would_refuse(run, file):
    result = run(file, "--max-length", "4")
    assert "cut from 23" in result.stdout
    assert "2 rows truncated at 4 (longest 23), 1 exact copy, 3 without a token in the loss" in result.stdout


def test_templates(run, tmp_path):
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Turin"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"messages": talk}]))
    assert "<|im_start|>assistant\n⟦Turin<|im_end|>⟧" in run(tmp_path / "talk.json", "--template", "chatml").stdout


def test_says_what_is_left_out(run, tmp_path):
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Turin", "reasoning_content": "Hm."}]
    row = {"messages": talk, "history": [["a", "b"]]}
    (tmp_path / "talk.json").write_text(json.dumps([row]))
    said = run(tmp_path / "talk.json", "--template", "ChatML").stderr
    assert "talk.json: not read: history" in said
    assert run(tmp_path / "talk.json", "--template", "ChatML", "--quiet").stderr == ""
    assert "the chat template does not write reasoning_content" in said


def test_says_which_rows_are_longer_than_the_model_reads(run, tmp_path):
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 16}))
    (tmp_path / "texts.json").write_text(json.dumps(["a b c", "a b c d e f g h i j k l m n o"]))
    assert "1 of 2 rows are longer than the 16 tokens that the model was made for" in run(tmp_path / "texts.json").stderr


def test_mistakes(run, file):
    with pytest.raises(ColumnError, match="no column 'input'"):
        run(file, "-c", "prompt=input")
    with pytest.raises(UsageError, match="--columns Input has no value"):
        run(file, "-c", "Input")
    with pytest.raises(ModelNotFound):
        run(file, "--model", "nowhere/at-all")

import csv
import json

import pytest

from whence import cli

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "evaluate benchmark", "whence.cli.evaluate:benchmark")
    monkeypatch.setitem(cli.COMMANDS, "evaluate compare", "whence.cli.evaluate:compare")


@pytest.fixture
def mmlu(tmp_path):
    for split, count in (("dev", 2), ("test", 6)):
        file = tmp_path / "mmlu" / split / f"virology_{split}.csv"
        file.parent.mkdir(parents=True)
        with file.open("w", newline="") as lines:
            csv.writer(lines).writerows([f"{split} {n}?", "a", "b", "c", "d", "ABCD"[n % 4]] for n in range(count))
    return tmp_path / "mmlu"


def test_benchmark(run, tiny_model_folder, mmlu, tmp_path):
    given = ("evaluate", "benchmark", tiny_model_folder, "--base", tiny_model_folder, "--data", mmlu, "--tasks", "virology")
    shown = run(*given, "--fewshot", "1", "--limit", "4", "--out", tmp_path / "out")
    row = next(line for line in shown.stdout.splitlines() if "virology" in line)
    assert row.count("%") == 4 and "+0.0 %" in row and "4" in row.split()
    made = json.loads(run(*given, "--fewshot", "1", "--limit", "4", "--out", tmp_path / "out", "--json", "-q").stdout)
    assert [(one["model"], one["n"]) for one in made["results"]] == [("base", 4), ("tuned", 4)]
    assert (tmp_path / "out" / "combined.md").exists() and (tmp_path / "out" / "benchmark.png").exists()
    said = run(
        "evaluate", "benchmark", tiny_model_folder, "--data", mmlu, "--tasks", "virologi", "--out", tmp_path / "no", code=2
    )
    assert "did you mean mmlu_virology?" in said.stderr and not (tmp_path / "no").exists()
    assert "fewshot 1 -> 2" in run(*given, "--fewshot", "2", "--limit", "4", "--out", tmp_path / "out", code=4).stderr


def test_from_prompts_with_answers_to_influential_examples(run, tiny_model_folder, data, queries, fitted, tmp_path):
    pairs, out = tmp_path / "pairs.json", tmp_path / "out"
    run(
        "generate",
        tiny_model_folder,
        "--base",
        tiny_model_folder,
        "--prompts",
        queries,
        "--max-new-tokens",
        "6",
        "--out",
        pairs,
    )
    run("score", tiny_model_folder, "-d", data, "-f", fitted, "--queries", pairs, "-o", tmp_path / "scores", "-q")
    shown = run("evaluate", "compare", pairs, "--scores", tmp_path / "scores", "--out", out)
    assert "tuned minus base" in shown.stdout and "ROUGE-L" in shown.stdout
    made = json.loads(run("evaluate", "compare", pairs, "--scores", tmp_path / "scores", "--out", out, "--json", "-q").stdout)
    alike = [row for row in made["summary"] if row["of"] == "base against tuned" and row["measure"] == "rouge1"]
    assert alike[0]["mean"] == 1 and alike[0]["n"] == len(json.loads(queries.read_text()))
    page = (out / "influential_examples.md").read_text()
    assert page.count("so: the tuned answer") == page.count("\n## ") == alike[0]["n"]
    assert "nats per copy" in page and "**Reference**" in page
    assert "no file" in run("evaluate", "compare", tmp_path / "none.json", "--out", out, code=2).stderr

"""What people who met a command for the first time ran into: folders for files, units that were cut, names that collide."""

import io
import json
import re

import pytest
from facts import facts, write_jsonl

from whence.cli import COMMANDS, FORMER, build, console
from whence.store.scores import open_scores


@pytest.fixture
def scored(run, tiny_model_folder, data, queries, fitted, tmp_path):
    """A run with factors and scores."""
    options = ("--queries", queries, "-o", tmp_path / "scores", "--quiet")
    run("score", tiny_model_folder, "-d", data, "-f", fitted, *options)
    return tmp_path


def test_a_run_stands_for_what_is_in_it(run, scored, tiny_model_folder, data, queries):
    assert json.loads(run("inspect", scored, "--json").stdout)["modules"]
    said = run("score", tiny_model_folder, "-d", data, "-f", scored, "--queries", queries, "-o", scored / "again")
    assert "4 x 12 scores" in said.stdout
    assert run("show", scored).stdout == run("show", scored / "scores").stdout


def test_a_folder_of_another_kind_is_named(run, scored, fitted, tiny_model_folder, data):
    assert "holds no scores" in run("show", fitted, code=4).stderr
    said = run("inspect", scored / "scores", code=4).stderr
    assert "holds no factors" in said and "of the stage score" in said
    assert "holds no index" in run("index", "search", fitted, tiny_model_folder, "-q", "Who?", code=4).stderr


def test_the_folder_of_a_training_is_not_its_model(run, tiny_model_folder, data, tmp_path):
    place = tmp_path / "runs" / "a" / "train" / "model"
    place.parent.mkdir(parents=True)
    tiny_model_folder.rename(place)
    for folder in (place.parent, place.parent.parent):
        said = run("fit", folder, "-d", data, "-o", tmp_path / "factors", code=2).stderr
        assert "is not a model, but a folder with one" in said and f"fix      {place}" in said


def test_whence_run_takes_the_folder_of_its_file(run, tmp_path):
    run("init", tmp_path / "small" / "whence.yaml", "--quiet")
    assert "runs" in run("run", tmp_path / "small", "--dry-run").stdout
    assert "run = small" in run("config", "show", tmp_path / "small").stdout.replace('"', "")
    said = run("run", tmp_path, "--dry-run", code=2).stderr
    assert f"There is no file {tmp_path / 'whence.yaml'}" in said and "whence init" in said


def test_a_folder_that_is_no_run_is_not_served(run, tiny_model_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    said = run("serve", tmp_path / "empty", "--no-browser", code=2).stderr
    assert "does not say which model and data it belongs to" in said and "--out" in said
    said = run("serve", tiny_model_folder, "--no-browser", code=2).stderr
    assert "does not say which data it was trained on" in said and f"whence serve {tiny_model_folder} --data DATA" in said


@pytest.mark.parametrize(("command", "code"), [("serve", 2), ("ask", 2), ("show", 4)])
def test_a_folder_that_is_not_there_is_said_to_be_so(run, tmp_path, command, code):
    question = ["Who?"] if command == "ask" else []
    assert f"There is no {tmp_path / 'nope'}." in run(command, tmp_path / "nope", *question, code=code).stderr


def test_show_lists_the_runs_of_a_folder(run, scored, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        (runs / name).symlink_to(scored)
    said = run("show", runs).stdout
    assert f"{runs / 'a' / 'scores'}" in said and f"{runs / 'b' / 'scores'}" in said
    assert f"next: whence show {runs / 'a' / 'scores'}" in said
    found = json.loads(run("show", runs, "--json").stdout)["runs"]
    assert [(entry["queries"], entry["rows"]) for entry in found] == [(4, 12)] * 2
    assert "is a folder of runs" in run("export", runs, "--out", runs / "x.csv", code=2).stderr


def test_plan_without_queries_speaks_of_none(run, tiny_model_folder, tmp_path):
    """Rows that are cut can't be queries, and a plan asks for none."""
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "Ada Velt was born in Turin. " * 20}] * 6)
    said = run("plan", tiny_model_folder, "-d", long, "--max-length", "20", "--no-calibrate")
    assert "16 queries" in said.stdout and "total" in said.stdout


@pytest.mark.parametrize("size", ["24", "24B", "0.5"])
def test_a_size_has_a_unit(run, tiny_model_folder, data, size):
    said = run("plan", tiny_model_folder, "-d", data, "--memory", size, code=2).stderr
    assert f"--memory {size} is " in said and "fix      --memory " in said and "GB" in said


def test_a_row_that_is_a_prompt_is_a_row(run, tiny_model_folder, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in facts()]
    del rows[3]["completion"]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    said = run("fit", tiny_model_folder, "-d", data, "-o", tmp_path / "factors", code=2).stderr
    assert "1 of 12 training rows have a prompt but no completion" in said and "query" not in said
    assert "'Where was Ada Velt born?'" in said and "--columns completion=COLUMN" in said


@pytest.mark.parametrize("width", [60, 80, 100])
def test_ranks_effects_and_units_are_never_cut(scored, monkeypatch, width):
    from whence.cli import show
    from whence.cli.ranking import Ranking

    scores = open_scores(scored / "scores")
    scores.examples["id"] = [f"a-very-long-name-of-a-row-{name}" for name in scores.examples["id"]]
    scores.examples["source"] = "a source with a long name"
    terminal = console.Terminal(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(console, "out", terminal)
    show.display(Ranking(scores, None, 3, 2), [0])
    lines = terminal.file.getvalue().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("rank"))
    assert all(name in lines[first] for name in ("rank", "effect", "share", "source", "id", "text"))
    for line, rank in zip(lines[first + 1 :], (1, 2, 3, -2, -1), strict=False):
        assert line.split()[0] == str(rank) and " nats " in line and "%" in line and len(line) <= max(width, 80)


def test_tables_of_modules_keep_their_numbers(run, scored, monkeypatch):
    terminal = console.Terminal(file=io.StringIO(), width=60, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(console, "out", terminal)
    console.print_table(("module", "share", "unit"), [("model.layers.11.mlp.a_very_long_name" * 3, "12.5 %", "1,234,567 nats")])
    written = terminal.file.getvalue()
    assert "12.5 %" in written and "1,234,567 nats" in written and "…" not in written


def test_trace_says_where_it_is_and_what_comes_next(run, tiny_model_folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tiny-llama").symlink_to(tiny_model_folder)
    said = {}
    for model in ("tiny-llama", "other/tiny-llama"):
        done = run("trace", model, "--data", "train.jsonl", "-q", "Where was Ada Velt born?", "--max-new-tokens", "2")
        said[model] = [line for line in done.stdout.splitlines() if line.startswith(("kept in ", "next: "))]
    places = {model: lines[0].split()[2].rstrip(",") for model, lines in said.items()}
    assert places["tiny-llama"].startswith("runs/tiny-llama-train/trace-")
    assert places["other/tiny-llama"].startswith("runs/other-tiny-llama-train/trace-")
    assert said["tiny-llama"][1] == f"next: whence show {places['tiny-llama']} --tokens --top 20"
    run(*said["tiny-llama"][1].split()[2:])


def test_trace_opens_the_page_on_what_it_found(run, tiny_model_folder, data, tmp_path, monkeypatch):
    asked = ("trace", tiny_model_folder, "-d", data, "-q", "Where was Ada Velt born?", "-a", " Oslo.", "-o", tmp_path / "run")
    opened = []
    monkeypatch.setattr("whence.cli.serve.open_page", lambda opening, at: opened.append((opening, at)))
    run(*asked, "--serve")
    ((opening, at),) = opened
    (scores,) = (tmp_path / "run").glob("trace-*")
    assert at == f"trace/scores:{scores.name}:0" and opening.open().kept_scores() == [scores]
    assert "one of them" in run(*asked, "--serve", "--json", code=2).stderr and len(opened) == 1


def test_a_short_option_means_one_thing():
    """Of all commands: -q is a question, -m modules, -n and -k rows to show."""
    from typer.main import get_command

    meanings: dict[str, set[str]] = {}
    for name in COMMANDS:
        found = get_command(build())
        for part in name.split():
            found = found.commands[part]
        for option in found.params:
            long = next((flag for flag in option.opts if flag.startswith("--")), None)
            for flag in option.opts:
                if flag.startswith("-") and not flag.startswith("--"):
                    meanings.setdefault(flag, set()).add(long)
    assert {flag: longs for flag, longs in meanings.items() if len(longs) > 1} == {}
    assert meanings["-q"] == {"--question"} and meanings["-m"] == {"--modules"}
    assert all(meanings.get(short) != {long} for short, long in FORMER.items())


def test_scripts_may_still_have_the_former_ones(run, tiny_model_folder, data):
    assert run("data", "preview", data, "-m", tiny_model_folder, "-n", "1").stdout.startswith("row 1")
    assert run("plan", tiny_model_folder, "-d", data, "--queries", "2", "--no-calibrate", "-q").stderr == ""


def test_one_row_and_one_query_are_not_many(run, tiny_model_folder, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", facts()[:1])
    given, out = (tiny_model_folder, "-d", rows), tmp_path / "a"
    said = [
        run("data", "preview", rows, "--model", tiny_model_folder),
        run("plan", *given, "--queries", 1, "--no-calibrate"),
        run("fit", *given, "-m", "*.1.mlp.up_proj", "-o", out / "factors"),
        run("inspect", out / "factors"),
        run("trace", *given, "-m", "*.1.mlp.up_proj", "-q", "Where was Ada Velt born?", "-o", out),
        run("score", *given, "-f", out / "factors", "--queries", rows, "-o", out / "scores"),
        run("show", out / "scores"),
        run("diff", out / "scores", out / "scores"),
        run("validate", out / "scores", "--quick"),
        run("report", out / "scores", "-o", out / "report"),
        run("index", "build", *given, "-o", out / "index"),
        run("generate", tiny_model_folder, "--prompts", rows, "-o", out / "said.json"),
    ]
    pages = [(out / "report" / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")]
    texts = "\n".join([*(part for result in said for part in (result.stdout, result.stderr)), *pages])
    things = "rows|quer(?:y|ie)s|questions|tokens|modules|examples|pairs|files|copies|answers|prompts|positions|steps|inputs"
    assert not re.findall(rf".{{,60}}(?<![\d.,/])\b1 (?:{things})\b.{{,20}}", texts)

"""What the page gives to copy: run in a shell and in Python, it shows the same rows first."""

import json
import shutil

import pytest
from commands import assembled
from typer.testing import CliRunner

import whence
from serve.conftest import python_of, serving, shown_by, words_of, write_run
from whence.serve import Opening

PROMPT, ANSWER = "Where was Ada Velt born?", " In Oslo, in Oslo."
HOSTILE = "-'a' \"b\" $HOME\n漢", "--`id` \\n\t!x \u202eغ"


@pytest.fixture(scope="module")
def bare(tmp_path_factory, tiny_tokenizer_file):
    """A run in a folder of an odd name, with all but an index, and a client of its server."""
    opening = write_run(tmp_path_factory.mktemp("it's $HOME"), tiny_tokenizer_file)
    run = whence.open(opening.model, data=opening.data, out=opening.out, **opening.settings)
    run.fit(examples="all", products="float32")
    run.self_influence(products="float32")
    file = run.out / "asked.jsonl"
    file.write_text("\n".join(json.dumps({"id": name, "prompt": PROMPT, "completion": ANSWER}) for name in ("1", "-x")))
    asked = whence.load_data(file, columns={"id": "id"})
    for folder in ("trace-a", "trace-b"):
        run.score(asked, out=run.out / folder, per="example" if folder == "trace-a" else "token")
    with serving(opening) as client:
        assert client.until("/api/run", lambda run: run["state"] != "loading")["state"] == "ready"
        yield run, client


def ids(rows):
    return [row["id"] for row in rows]


def check(asked, top, query=0):
    """Both copies of a question have the rows that the page shows, in its order."""
    raises, lowers = ids(asked["query"]["raises"]), ids(asked["query"]["lowers"])
    scores = python_of(asked["copy"]["python"]).scores
    best, worst = scores.top(query, top), scores.top(query, top, lowest=True)
    assert list(best["id"])[: len(raises)] == raises and list(worst["id"])[: len(lowers)] == lowers and raises
    (shown,) = shown_by(asked["copy"]["command"])["queries"]
    assert ids(shown["rows"])[: len(raises)] == raises
    return shown


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"method": "index", "top": 3},
        {"contrast": " In Turin."},
        {"span": [4, 8]},
        {"span": [13, 17]},
        {"span": [13, 19]},
        {"where": ["source=Oslo", "tokens>=1"]},
        {"measurement": "margin"},
        dict(zip(("prompt", "completion"), HOSTILE, strict=True)),
    ],
    ids=str,
)
def test_a_question(client, asked, monkeypatch):
    monkeypatch.setattr("whence.serve.commands.CANDIDATES", 8)
    body = {"prompt": PROMPT, "completion": ANSWER, "top": 4} | asked
    found = client("POST", "/api/ask", body)
    shown = check(found, body["top"])
    assert shown["prompt"] == body["prompt"] and shown["completion"] == body["completion"]
    words = words_of(found["copy"]["command"])
    assert ("--candidates" in words) == ("method" not in asked) and ("--span-at" in words) == (asked.get("span", [0])[0] == 13)
    again = client("GET", f"/api/ask/{found['key']}?top={body['top']}")["copy"]
    assert "where" in asked or again == found["copy"]


def test_a_question_to_a_run_without_an_index(bare):
    """Its command builds one, so this test leaves none behind."""
    run, client = bare
    found = client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER, "top": 4, "damping": 3.0})
    assert "builds an index first" in found["copy"]["note"] and ".trace(" in found["copy"]["python"]
    assert "--damping" in words_of(found["copy"]["command"])
    check(found, 4)
    shutil.rmtree(run.out / "index")
    some = client("GET", f"/api/ask/{found['key']}?top=4&where=source=Oslo&where=text~ada")
    scores = python_of(some["copy"]["python"]).scores
    assert scores.example_ids == ["row-4"] == ids(some["query"]["raises"] + some["query"]["lowers"])


@pytest.mark.parametrize("asked", [{"method": "dot"}, {"method": "bm25", "contrast": None}, {"damping": 3.0}], ids=str)
def test_what_no_command_asks_is_copied_as_python(client, asked):
    found = client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER, "top": 3} | asked)
    assert found["copy"]["command"] is None and found["copy"]["note"]
    scores, raises = python_of(found["copy"]["python"]).scores, ids(found["query"]["raises"])
    assert list(scores.top(0, 3)["id"])[: len(raises)] == raises != []


def test_a_row_that_is_asked_about_has_no_copy(client):
    found = client("POST", "/api/ask", {"row": "row-1", "top": 3})["copy"]
    assert found["command"] is found["python"] is None and "training row" in found["note"]


@pytest.mark.parametrize("where", ["", "?where=source=Oslo"])
@pytest.mark.parametrize("number", [0, 1])
def test_saved_scores(bare, number, where):
    """The second question is called -x, and the first is called 1, which is the number of the second."""
    _, client = bare
    found = client("GET", f"/api/scores/trace-a/{number}{where}")
    assert check(found, 20, number)["id"] == ("1", "-x")[number]
    assert "trace-a" in found["copy"]["command"] and found["copy"]["note"] == ""


def test_saved_scores_of_several_trainings(client):
    whole = client("GET", "/api/scores/trace-stages/0")
    scores, raises = python_of(whole["copy"]["python"]).scores, ids(whole["query"]["raises"])
    assert list(scores.top(0, 20)["id"])[: len(raises)] == raises and "by themselves" in whole["copy"]["note"]
    stages = shown_by(whole["copy"]["command"])["stages"]
    assert client("GET", "/api/scores/trace-stages/0?where=source=Oslo")["copy"]["command"] is None
    folder = words_of(whole["copy"]["command"])[2]
    refused = CliRunner().invoke(assembled(), ["show", folder, "--where", "source=Oslo"])
    assert refused.exit_code == 2 and "finetuning/scores --where source=Oslo" in refused.stderr
    for stage in whole["stages"]:
        alone = client("GET", f"/api/scores/trace-stages@{stage['stage']}/0")
        assert ids(stages[stage["stage"]]["queries"][0]["rows"])[: len(alone["query"]["raises"])] == ids(
            alone["query"]["raises"]
        )
        check(alone, 20)
    sides = [stage["key"] for stage in whole["stages"]]
    found = client("POST", "/api/compare", {"a": sides[0], "b": sides[1]})
    assert found["rows_in_common"] == 0 and shown_by(found["copy"]["command"])["stages"] == stages
    names = python_of(found["copy"]["python"])
    assert [list(each.top(0, 20)["id"])[:2] for each in (names.a, names.b)] == [ids(found[side]["raises"])[:2] for side in "ab"]


def test_two_questions_beside_each_other(bare, client):
    run, server = bare
    keys = [
        server("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER, "method": method})["key"]
        for method in ("exact", "bm25")
    ]
    for a, b in (keys, (keys[0], "scores:trace-a:1"), ("scores:trace-a:0", "scores:trace-b:0")):
        found = server("POST", "/api/compare", {"a": a, "b": b, "top": 4})
        both = python_of(found["copy"]["python"]).found
        assert both.spearman[0] == pytest.approx(found["spearman"], abs=1e-6)
        assert (found["copy"]["command"] is None) == (b != "scores:trace-b:0")
    told = shown_by(found["copy"]["command"])
    assert told["rows_in_common"] == found["rows_in_common"] and told["queries"][0]["spearman"] == pytest.approx(
        found["spearman"]
    )
    index = client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER, "method": "index"})["key"]
    assert "# This scores all rows;" in client("POST", "/api/compare", {"a": index, "b": index})["copy"]["python"]


def test_factors(client):
    every = client("GET", "/api/factors?damping=0.01")
    assert shown_by(every["copy"]["command"])["modules"] == every["modules"]
    name = every["modules"][2]["module"]
    one = client("GET", f"/api/factors/module?name={name}&damping=0.01")
    told, names = shown_by(one["copy"]["command"]), python_of(one["copy"]["python"])
    assert told["module"] == name and told["effective_rank"] == pytest.approx(one["effective_rank"])
    assert names.printed.count("effective_rank") == 1 and name in names.printed
    assert python_of(every["copy"]["python"]).printed.count("effective_rank") == len(every["modules"])


@pytest.mark.parametrize(
    "asked",
    [
        "data?limit=3&offset=1",
        "data?sort=length&limit=3",
        "data?sort=self&limit=9",
        "data?sort=self&source=Oslo",
        "data?search=ada+born",
        "data?search=ROW-1",
        "data?decided=drop",
        "review?limit=4",
        "review?decided=any&limit=5",
    ],
)
def test_training_rows(bare, asked):
    _, client = bare
    client("POST", "/api/decisions", {"id": "row-2", "verdict": "drop"})
    found = client("GET", f"/api/{asked}")
    listed = [row["id"] for row in found["rows"]]
    names = python_of(found["copy"]["python"])
    assert [line for line in names.names if line in listed] == listed != []
    assert [each for each in listed if f"{each} " in names.printed] == listed
    if "sort=self" in asked or "decided=any" in asked:
        assert found["copy"]["note"] == ""
        assert ids(shown_by(found["copy"]["command"])["queries"][0]["rows"])[: len(listed)] == listed
    else:
        assert found["copy"]["note"]
    client("POST", "/api/decisions/undo")


def test_a_run_that_does_not_open_alone(bare):
    """Nothing was made in its folder by a command, so Python names the model and its data."""
    run, client = bare
    (run.out / "opened.json").rename(run.out / "away.json")
    try:
        found = client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER, "top": 4})
        assert found["copy"]["command"] is None and "does not yet say" in found["copy"]["note"]
        opened = python_of("\n".join(found["copy"]["python"].splitlines()[:3])).run
        assert opened.name == run.name and opened.out == run.out and opened.reading.as_json() == run.reading.as_json()
    finally:
        (run.out / "away.json").rename(run.out / "opened.json")


def test_a_run_of_a_whence_yaml_that_asks_by_other_settings(tmp_path, tiny_tokenizer_file):
    """The page asks with the damping of its own question, and so do the copies."""
    opening = write_run(tmp_path, tiny_tokenizer_file)
    home = tmp_path / "runs" / "a"
    home.mkdir(parents=True)
    reading = {name: opening.settings[name] for name in ("max_length", "append_eos", "columns")}
    settings = {
        "model": {"base": opening.model, "dtype": "float32"},
        "prompts": {"path": "none.json"},
        "data": {"path": opening.data, **reading},
    }
    settings |= {"run": "a", "out": ".", "fit": {"examples": "all", "products": "float32"}, "score": {"damping": 40.0}}
    (home / "whence.yaml").write_text(json.dumps(settings))
    whence.open(home).fit()
    with serving(Opening.of(str(home))) as client:
        client.until("/api/run", lambda run: run["state"] == "ready")
        found = client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER, "top": 4})
        assert "--damping" in words_of(found["copy"]["command"]) and "damping=0.1" in found["copy"]["python"]
        check(found, 4)
        same = client("POST", "/api/ask", {"prompt": PROMPT, "completion": ANSWER, "top": 4, "damping": 40.0})
        assert ids(same["query"]["raises"]) != ids(found["query"]["raises"]) and "damping" not in same["copy"]["python"]

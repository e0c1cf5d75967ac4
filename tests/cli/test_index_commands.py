"""The commands that build an index and search it."""

import json

import numpy as np
import pytest
from facts import facts, write_jsonl

import whence
from whence.data import load_data
from whence.fitting import open_factors
from whence.indexing import open_index
from whence.operators import Identity
from whence.store.intact import sealed

SIZES = ("--dim", "4", "--chunks", "2")


@pytest.fixture
def built(run, tiny_model_folder, data, fitted, tmp_path):
    """An index of the facts, in the basis of their factors."""
    run("index", "build", tiny_model_folder, "-d", data, "-f", fitted, "-o", tmp_path / "index", *SIZES, "--quiet")
    return tmp_path / "index"


def test_building(run, tiny_model_folder, data, tmp_path):
    given = ("index", "build", tiny_model_folder, "--data", data, "--out", tmp_path / "index", *SIZES)
    first = run(*given)
    assert f"{tmp_path / 'index'}: 12 rows of 6 modules" in first.stdout and "4 x 4 int8 each" in first.stdout
    assert f"next: whence index search {tmp_path / 'index'} {tiny_model_folder} -q" in first.stdout
    again = run(*given, "--json")
    about = json.loads(again.stdout)
    assert "nothing to compute" in again.stderr and about["rows"] == 12 and about["dim"] == 4
    assert about["bytes"] == sum(file.stat().st_size for file in (tmp_path / "index").iterdir())
    assert "settings.kept int8 -> float16" in run(*given, "--kept", "float16", code=4).stderr


def test_estimates_are_those_of_the_library(run, built, tiny_model_folder, queries, fitted):
    given = ("index", "search", built, tiny_model_folder, "-f", fitted, "--queries", queries, "--damping", "0.3", "-k", "2")
    shown = json.loads(run(*given, "--json").stdout)
    model, tokenizer = whence.load_model(str(tiny_model_folder))
    operator = open_factors(fitted).inverse(0.3)
    found = open_index(built).search(model, whence.CausalLM(tokenizer), load_data(queries), operator)
    assert shown["estimates"] and "estimates from projections (4 x 4" in shown["notes"][0] and shown["n_train"] == 12
    for number, query in enumerate(shown["queries"]):
        best = found.top(number, 2)
        assert [row["id"] for row in query["rows"][:2]] == list(best["id"])
        assert [row["value"] for row in query["rows"][:2]] == pytest.approx(list(best["value"]), rel=1e-3)
    said = run(*given)
    assert "estimates from projections" in said.stdout and "--exact 20" in said.stdout and "nats over" in said.stdout


def test_n_is_the_rows_trained_on(run, tiny_model_folder, data, queries, tmp_path):
    run("index", "build", tiny_model_folder, "-d", data, "-o", tmp_path / "some", *SIZES, "--limit", "6", "--quiet")
    given = ("index", "search", tmp_path / "some", tiny_model_folder, "--queries", queries, "--json")
    estimated = json.loads(run(*given).stdout)
    exact = json.loads(run(*given, "-d", data, "--limit", "6", "--exact", "2").stdout)
    assert estimated["n_train"] == exact["n_train"] == 12


def test_asking_builds_what_is_missing_once(run, tiny_model_folder, data, queries, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    question = load_data(queries)[0]
    given = ("ask", tiny_model_folder, "-d", data, question["prompt"], "--answer", question["completion"], "--top", "2")
    first, again = run(*given), run(*given, "--json")
    assert "has no index yet" in first.stderr and "exact scores of" in first.stdout and "has no index yet" not in again.stderr
    document = json.loads(again.stdout)
    model, tokenizer = whence.load_model(str(tiny_model_folder))
    (folder,) = tmp_path.glob("runs/*/factors")
    operator = open_factors(folder).inverse(0.1)
    scores = whence.score(model, whence.CausalLM(tokenizer), [question], load_data(data), operator)
    best = scores.top(0, 12)
    assert document["queries"][0]["rows"][0]["value"] == pytest.approx(best["value"].iloc[0], rel=1e-3)
    filtered = run(*given, "--where", "text~cleo", "--json")
    left = [name for name, text in zip(best["id"], best["text"], strict=True) if "Cleo" in text]
    assert [row["id"] for row in json.loads(filtered.stdout)["rows"]] == left and 2 < len(left) < 12
    assert f"{len(left)} of {len(left)} rows with text~cleo" in run(*given, "--where", "text~cleo").stdout
    assert "not a condition" in run(*given, "--where", "red", code=2).stderr
    alone = json.loads(run("ask", folder.parent, *given[4:], "--json").stdout)  # the folder says of what it is
    assert alone["queries"] == document["queries"]
    known = {name: scores.about[name] for name in ("operator", "measurement")}
    known |= {"gain": 0.25, "low": 0.2, "high": 0.3, "certain": True, "retrainings": 7, "says": "calibrated on 7 retrainings"}
    (folder.parent / "scores").mkdir()
    removal = {"sentence": "What was found.", "calibration": known}
    (folder.parent / "scores" / "removal.json").write_text(json.dumps(sealed({"removal": removal})))
    sized = json.loads(run(*given, "--json").stdout)
    row, found, plain = sized["queries"][0]["rows"][0], sized["rows"][0], document["rows"][0]
    assert row["value"] == pytest.approx(0.25 * row["slope"]) and row["slope"] == document["queries"][0]["rows"][0]["value"]
    assert [found["value"], found["slope"]] == pytest.approx([row["value"], row["slope"]]) and plain["value"] == plain["slope"]
    assert found["estimate"] == pytest.approx(0.25 * plain["estimate"]) and sum(found["tokens"]) == pytest.approx(
        found["value"]
    )
    assert "calibrated on 7 retrainings (0.25 x the slope)" in run(*given).stdout


def test_asking_with_another_damping_builds_the_index_with_it(run, tiny_model_folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ("ask", tiny_model_folder, "-d", data, "Where was Ada Velt born?", "--answer", " In Oslo.", "--damping", "0.5")
    for _ in range(2):
        assert "inverse with damping 0.5" in json.loads(run(*asked, "--json").stdout)["made_by"]


@pytest.mark.parametrize("curved", [True, False])
def test_exact_scores_of_the_candidates(run, built, tiny_model_folder, data, queries, fitted, curved):
    given = ("index", "search", built, tiny_model_folder, *(("-f", fitted) if curved else ()), "--queries", queries)
    shown = json.loads(run(*given, "--data", data, "--exact", "3", "--top", "3", "--json").stdout)
    model, tokenizer = whence.load_model(str(tiny_model_folder))
    operator = open_factors(fitted).inverse(0.1) if curved else Identity()
    exact = whence.score(model, whence.CausalLM(tokenizer), load_data(queries), load_data(data), operator)
    assert not shown["estimates"] and shown["n_train"] == 12
    for number, query in enumerate(shown["queries"]):
        values = dict(zip(exact.example_ids, exact.values[number], strict=True))
        for row in query["rows"]:
            assert row["value"] == pytest.approx(values[row["id"]], rel=1e-3, abs=1e-6 * float(np.abs(exact.values).max()))


def test_a_question_is_answered_first(run, built, tiny_model_folder, data, fitted):
    given = ("index", "search", built, tiny_model_folder, "-f", fitted, "-q", "Where was Ada Velt born?")
    shown = run(*given, "--max-new-tokens", "4").stdout
    assert "generated greedily" in shown and shown.startswith('"Where was Ada Velt born?" -> ')
    said = run(*given, "-a", " In Oslo.", "--contrast", " In Turin.", "--norm", "cosine", "--data", data, "--exact", "2").stdout
    assert "rather than" in said and "exact scores of the" in said and "next:" not in said


def test_what_is_refused(run, built, tiny_model_folder, tiny_llama, tiny_tokenizer, data, fitted, tmp_path):
    search = ("index", "search", built, tiny_model_folder)
    assert "-q QUESTION" in run(*search, code=2).stderr
    assert "ask MODEL --data DATA" in run("ask", tiny_model_folder, "Who?", code=2).stderr
    assert "-q QUESTION" in run(*search, "-q", "Who?", "--queries", data, code=2).stderr
    assert "--data DATA" in run(*search, "-q", "Who?", "--exact", "2", code=2).stderr
    fewer = write_jsonl(tmp_path / "fewer.jsonl", facts()[1:])
    assert "other rows" in run(*search, "-q", "Who?", "-a", " Bo.", "--exact", "2", "--data", fewer, code=4).stderr
    (built / "manifest.json").rename(tmp_path / "manifest.json")
    assert str(built) in run(*search, "-q", "Who?", "-a", " Bo.", code=4).stderr
    (tmp_path / "manifest.json").rename(built / "manifest.json")
    run("fit", tiny_model_folder, "-d", data, "-o", tmp_path / "attention", "-m", "attention", "--quiet")
    other = run(*search, "-f", tmp_path / "attention", "-q", "Who?", "-a", " Bo.", code=2).stderr
    assert "does not act on all modules of the index" in other
    tiny_llama.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    for saved in (tiny_llama, tiny_tokenizer):
        saved.save_pretrained(tmp_path / "changed")
    changed = run("index", "search", built, tmp_path / "changed", "-q", "Who?", "-a", " Bo.", code=4).stderr
    assert "built from another model" in changed

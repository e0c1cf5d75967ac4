"""`whence diff` and `whence compare` as a user types them."""

import json

import pytest
import yaml

from whence.cli.from_settings import pairs


@pytest.fixture
def two(run, tiny_model_folder, data, queries, fitted, tmp_path):
    given = ("score", tiny_model_folder, "-d", data, "-f", fitted, "--queries", queries, "--quiet")
    run(*given, "-o", tmp_path / "a")
    run(*given, "--damping", "100", "-o", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def test_two_sets_of_scores(run, two):
    a, b = two
    said = run("diff", a, b).stdout
    assert "in common: 4 queries, 12 rows" in said and "overlap@10" in said and "moved most for" in said
    assert "inverse with damping 100" in said and "overlap@100" not in said
    found = json.loads(run("diff", a, b, "--json").stdout)
    assert found["rows_in_common"] == 12 and -1 <= found["spearman"] < 1 and len(found["queries"]) == 4
    assert {"id", "rank_a", "rank_b", "text"} <= set(found["queries"][0]["moved"][0])
    assert json.loads(run("diff", a, a, "--json").stdout)["spearman"] == 1.0
    assert "both have the same order" in run("diff", a, a).stdout


def test_other_rows_are_named(run, two, tiny_model_folder, queries, fitted, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "Who is it?", "completion": " Nobody."}\n')
    given = ("-f", fitted, "--queries", queries, "--quiet", "-o", tmp_path / "c")
    run("score", tiny_model_folder, "-d", other, *given)
    assert "no rows in common" in run("diff", two[0], tmp_path / "c", code=2).stderr


@pytest.mark.slow
def test_methods_on_one_run(run, tiny_model_folder, data, queries, tmp_path):
    settings = {
        "run": "r",
        "out": str(tmp_path / "r"),
        "model": {"base": str(tiny_model_folder)},
        "data": {"path": str(data)},
        "prompts": {"path": str(queries)},
        "fit": {"examples": "all"},
        "score": {"queries": "prompts", "check": False},
        "evaluate": None,
    }
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(settings))
    run("run", tmp_path / "w.yaml", "--quiet")
    asked = ("compare", tmp_path / "r", "--methods", "ekfac,diagonal,cg", "--set", "cg.tolerance=0.05", "--quiet")
    found = json.loads(run(*asked, "--json").stdout)
    assert [each["method"] for each in found["methods"]] == ["ekfac", "diagonal", "cg"]
    assert found["methods"][0]["spearman"] == 1.0 and found["methods"][2]["operator"].endswith("to 0.05")
    table = run(*asked).stdout
    assert "Spearman with ekfac" in table and "not quality in itself" in table
    assert all((tmp_path / "r" / "methods" / name).is_file() for name in ("comparison.json", "comparison.png"))


def test_what_is_no_run_and_settings_of_no_method(run, tmp_path):
    assert "is not a run" in run("compare", tmp_path, "--methods", "ekfac", code=2).stderr
    assert "is not for a method" in run("compare", tmp_path, "--methods", "ekfac", "--set", "damping=1", code=2).stderr


def test_settings_that_are_no_yaml_are_text():
    given = ["cg.near=[", "cg.damping=\x1b[2J", "cg.rank=12", "cg.tolerance=*a"]
    found = pairs(given, "--set", "METHOD.NAME=VALUE", yaml=True)
    assert found == {"cg.near": "[", "cg.damping": "\x1b[2J", "cg.rank": 12, "cg.tolerance": "*a"}

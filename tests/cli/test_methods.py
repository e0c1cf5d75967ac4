"""Methods on the command line: what there is, and scores by one of them."""

import json

import numpy as np
import pytest
from facts import facts

from whence.methods.base import recipes
from whence.store.scores import open_scores


@pytest.fixture
def trained(run, tiny_model_folder, data, tmp_path):
    folder = tmp_path / "train"
    run(
        "train",
        tiny_model_folder,
        "--data",
        data,
        "-o",
        folder,
        "--epochs",
        "2",
        "--save-steps",
        "1",
        "--evaluation",
        "0",
        "--quiet",
    )
    return folder


def test_all_methods_are_listed(run):
    listed = run("methods", "ls").stdout
    assert all(f"\n{name} " in listed for name in recipes()), "a line for each"
    found = json.loads(run("methods", "ls", "--json").stdout)
    assert [each["name"] for each in found] == list(recipes())
    assert all(each["price"] and each["formula"] and each["title"] for each in found)


def test_one_method_is_shown_with_its_settings(run):
    shown = run("methods", "show", "cg").stdout
    assert "grad m(query)^T" in shown and "tolerance" in shown and "0.0001" in shown and "O'Leary 1980" in shown
    found = json.loads(run("methods", "show", "cg", "--json").stdout)
    assert any({"name": "damping", "default": 0.1}.items() <= each.items() for each in found["settings"])
    assert "settings: none" in run("methods", "show", "tracin").stdout
    assert "did you mean tracin?" in run("methods", "show", "tracim", code=2).stderr


def test_a_method_scores_with_settings_of_its_own(run, tiny_model_folder, data, queries, fitted, tmp_path):
    given = (tiny_model_folder, "-d", data, "-f", fitted, "--queries", queries, "--quiet")
    run("score", *given, "--damping", "0.2", "-o", tmp_path / "plain")
    run("score", *given, "--method", "ekfac", "--damping", "0.2", "-o", tmp_path / "ekfac")
    plain, ekfac = open_scores(tmp_path / "plain"), open_scores(tmp_path / "ekfac")
    np.testing.assert_array_equal(plain.raw, ekfac.raw)
    assert ekfac.about["method"] == "ekfac" and "Grosse" in ekfac.about["source"] and "0.2" in ekfac.about["operator"]
    made = json.loads(
        run(
            "score",
            *given,
            "--method",
            "cg",
            "--set",
            "tolerance=0.05",
            "--set",
            "iterations=60",
            "-o",
            tmp_path / "cg",
            "--json",
        ).stdout
    )
    assert made["method"] == "cg" and made["operator"].endswith("to 0.05") and made["unit"] == "nats per copy"
    shown = run("show", tmp_path / "cg").stdout
    assert "conjugate gradients to 0.05" in shown


def test_a_method_that_looks_back_at_the_training(run, trained, data, queries, tmp_path):
    given = (trained / "model", "-d", data, "--queries", queries, "--method", "tracin", "-o", tmp_path / "scores")
    assert "--training FOLDER" in run("score", *given, code=2).stderr
    run("score", *given, "--training", trained, "--modules", "*.0.mlp.up_proj")
    scores = open_scores(tmp_path / "scores")
    made_from = (tmp_path / "scores" / "config.json").read_text()
    assert "model.layers.0.mlp.up_proj" in made_from and "down_proj" not in made_from
    assert scores.shape == (4, len(facts())) and scores.unit == "nats per step on the row"


@pytest.mark.parametrize(
    "given, said",
    [
        (("--method", "ekfak"), "did you mean ekfac?"),
        (("--method", "ekfac", "--set", "dampin=1"), "did you mean damping?"),
        (("--method", "ekfac", "--set", "damping=much"), "damping can't be much"),
        (("--method", "ekfac", "--set", "damping"), "has no value"),
        (("--method", "tracin", "--damping", "1"), "TracIn has no setting 'damping'"),
        ((), "--factors FOLDER (whence fit makes it), or --method NAME"),
        (("--set", "damping=1", "-f", "x"), "--set is for methods"),
        (("--training", "x", "-f", "x"), "--training is for methods"),
        (("--modules", "all", "-f", "x"), "--modules is for methods"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_loaded(run, data, queries, tmp_path, given, said):
    asked = ("score", "no-such-model", "-d", data, "--queries", queries, "-o", tmp_path / "scores")
    assert said in run(*asked, *given, code=2).stderr


def test_self_influence_is_no_question_for_a_method(run, data, tmp_path):
    assert "without --method" in run("score", "m", "-d", data, "--self", "--method", "cg", "-o", tmp_path / "s", code=2).stderr

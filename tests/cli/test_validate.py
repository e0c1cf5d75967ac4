"""`whence validate`, with checks on settings of a few points."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from whence import cli
from whence.tasks import Classification
from whence.validate import settings
from whence.validate.settings import Setting, seeded
from whence.validate.trainer import Recipe


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "validate", "whence.cli.validate:validate")


@pytest.fixture
def tiny(monkeypatch):
    """A setting "tiny": points of two classes and a net of 4 units."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(36, 3, generator=generator)
    pairs = [(x[i], int(x[i].sum() > 0)) for i in range(36)]

    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    recipe = Recipe(0.2, 10, 10, "momentum", weight_decay=1e-2)
    made = Setting("tiny", "tiny", lambda seed: seeded(seed, build), Classification(), pairs[:30], pairs[30:], recipe)
    monkeypatch.setitem(settings.SETTINGS, "tiny", lambda _: made)
    monkeypatch.setattr(settings, "BUNDLED", ("diabetes", "digits", "tiny"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Choose a check."),
        (["--lds", "--pbrf"], "One check at a time."),
        (["--quick"], "none is named"),
        (["runs", "--pbrf"], "can't retrain the model of a run"),
        (["runs", "--removal"], "is not a run"),
        (["RUN", "--removal", "--tail-patch", "--orders", "2"], "trains nothing again"),
        (["--pbrf", "--on", "digits", "--rows", "2"], "too few"),
        (["--pbrf", "--on", "nowhere"], "no setting 'nowhere'"),
        (["--pbrf", "--on", "concrete"], "--data"),
    ],
)
def test_mistakes_say_what_to_type(run, words, said):
    result = run("validate", *words, code=2)
    assert said in result.stderr and ("fix" in result.stderr or "accepted" in result.stderr)


def test_scores_without_a_run_are_refused(run, tmp_path):
    result = run("validate", tmp_path, "--quick", code=2)
    assert "Nothing says what these scores were made from" in result.stderr


def test_a_traced_run_is_checked_by_its_folder_or_that_of_its_scores(run, tiny_model_folder, data, tmp_path):
    traced = ("trace", tiny_model_folder, "-d", data, "-q", "Where was Ada Velt born?", "--out", tmp_path / "a", "-a")
    said = [run(*traced, answer).stdout for answer in (" In Oslo.", " In Turin.")]
    first, newest = (Path(re.search(r"whence validate (\S+) --quick", text)[1]) for text in said)
    assert "a copy of the question ranks" in run("validate", tmp_path / "a", "--quick").stdout
    assert (newest / "quick.json").is_file() and not (first / "quick.json").exists()
    run("validate", first, "--quick", "--json")
    assert (first / "quick.json").is_file()


def test_pbrf_shows_tables_and_keeps_files(run, tiny, tmp_path):
    words = ["validate", "--pbrf", "--on", "tiny", "--rows", 4, "--queries", 3, "--damping", 0.5, "--out", tmp_path, "-q"]
    result = run(*words)
    for title in ("Agreement with the PBRF", "Convergence in the size of the change", "From retraining to influence"):
        assert title in result.stdout
    assert "Exact influence agrees" in result.stdout and "EK-FAC" in result.stdout
    place = tmp_path / "pbrf-tiny"
    assert {file.name for file in place.glob("*.png")} == {"scatter.png", "methods.png", "convergence.png", "ladder.png"}
    document = json.loads((place / "result.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert len(document["rows"]) == 4 and document["effects"][0]["pbrf"]
    assert "| EK-FAC |" in (place / "result.md").read_text(encoding="utf-8")
    again = json.loads(run(*words, "--json").stdout, parse_constant=pytest.fail)[0]
    assert again["tables"] == document["tables"] and "effects" not in again
    assert "a different --out" in run("validate", "--pbrf", "--on", "tiny", "--rows", 5, "--out", tmp_path, "-q", code=4).stderr


def test_loo_compares_two_settings_in_one_figure(run, tiny, tmp_path):
    words = ["--rows", 3, "--queries", 3, "--out", tmp_path]
    result = run("validate", "--loo", "--on", "linear", "--on", "tiny", *words, "-q")
    assert "Influence predicts" in result.stdout and result.stdout.count("Agreement with leaving one out") == 2
    assert (tmp_path / "loo.png").exists() and (tmp_path / "loo-linear" / "result.md").exists()


def test_lds_keeps_its_bank_and_removal_its_curve(run, tiny, tmp_path):
    result = run("validate", "--lds", "--on", "tiny", "--rows", 8, "--out", tmp_path, "-q")
    assert "noise ceiling" in result.stdout and (tmp_path / "lds-tiny" / "bank-removals.npz").exists()
    assert (tmp_path / "lds-tiny" / "lds.png").exists()
    result = run("validate", "--removal", "--on", "tiny", "--queries", 2, "--out", tmp_path, "-q")
    assert "than without random rows" in result.stdout and (tmp_path / "removal-tiny" / "removal.png").exists()


def test_missing_sibling_breaks_its_own_check_only(run, tiny, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "whence.validate.facts", None)
    with pytest.raises(ImportError):
        run("validate", "--facts", "--out", tmp_path, "-q")
    run("validate", "--removal", "--on", "tiny", "--queries", 1, "--out", tmp_path, "-q")

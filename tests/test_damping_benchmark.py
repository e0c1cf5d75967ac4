"""The sweep of dampings writes what it measured, on banks that it does not make; what is committed says what it is said to."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks.damping import DAMPINGS, METHODS, SETTINGS, TRAINING, WHOLE, main
from benchmarks.quality import EXACT, MEASURES
from whence.errors import WhenceError
from whence.validate.bank import Spec, make_bank
from whence.validate.settings import setting

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damping")
    for spec in (Spec("removals", subsets=6, share=0.05), Spec("halves", subsets=6)):
        make_bank(setting("diabetes"), spec, folder / "banks" / f"diabetes-{spec.kind}.npz")
    methods = "EK-FAC,exact Gauss-Newton,Arnoldi without complement,conjugate gradients"
    assert main(["--settings", "diabetes", "--out", str(folder), "--methods", methods], (0.1, TRAINING)) == 0
    return folder, json.loads((folder / "damping.json").read_text())["diabetes"]


def test_every_damping_has_a_value_per_measure(written):
    folder, found = written
    values = {(row["method"], row["damping"], row["measure"]): row for row in found["rows"]}
    assert len(values) == len(found["rows"]) == (3 * 2 + 1) * len(MEASURES)
    text = (folder / "damping.md").read_text()
    for (method, how, measure), row in values.items():
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert f"{row['value']:.3f} ± {(row['ci_high'] - row['ci_low']) / 2:.3f}" in text, (method, how, measure)
    for measure in MEASURES:
        pair = [values[method, TRAINING, measure]["value"] for method in ("exact Gauss-Newton", "conjugate gradients")]
        assert pair[0] == pytest.approx(pair[1], abs=0.02), "one matrix, inverted in two ways"
    assert {gap["of"] for gap in found["ahead"]} >= {"EK-FAC, damping 0.1"}


def test_another_method_leaves_the_rows_of_the_others(written):
    folder, found = written
    assert main(["--settings", "diabetes", "--out", str(folder), "--methods", "diagonal"], (0.1, TRAINING)) == 0
    after = json.loads((folder / "damping.json").read_text())["diabetes"]
    assert after["rows"][: len(found["rows"])] == found["rows"] and after["ahead"] == found["ahead"]
    assert {row["method"] for row in after["rows"][len(found["rows"]) :]} == {"diagonal"}


def test_it_makes_no_bank(tmp_path):
    with pytest.raises((WhenceError, FileNotFoundError)):
        main(["--settings", "diabetes", "--out", str(tmp_path)])


def test_committed_with_the_damping_of_training_the_exact_matrix_is_ahead_of_factors():
    """For small removals and random halves, whatever EK-FAC is damped with, and for models of another seed."""
    found = json.loads((RESULTS / "damping.json").read_text())
    assert set(found) == set(SETTINGS)
    for own in found.values():
        assert len(own["ahead"]) == 2 * len(MEASURES) and all(gap["ci_low"] > 0 for gap in own["ahead"])
    for name, own in found.items():
        tried = {(row["method"], row["damping"]) for row in own["rows"]}
        every = [method for method in METHODS if method != "conjugate gradients" and (method != WHOLE or name in EXACT)]
        assert tried == {*itertools.product(every, (*DAMPINGS, TRAINING)), ("conjugate gradients", TRAINING)}

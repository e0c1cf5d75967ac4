"""A Nystroem approximation as an inverse, and near the matrix that conjugate gradients solve with."""

import pytest
from distributed import work
from distributed.processes import run
from inverses import QUERIES, ROWS, found, trained
from killing import killed_and_resumed
from oracle import agree

from benchmarks.oracles.curvature import ORACLES
from whence.errors import UsageError


@pytest.mark.parametrize(
    "settings", [{"absolute_damping": 0.05}, {"damping": "training"}, {"matrix": "empirical-fisher"}], ids=str
)
def test_it_is_its_oracle(settings):
    scores = found("nystroem", rank=40, **settings)
    agree(scores.values, ORACLES["nystroem"](trained(), rank=40, **settings), 1e-6)
    assert "Nystroem approximation of rank 40" in scores.about["operator"]


def test_with_the_matrix_s_own_rank_it_is_exact():
    """An empirical Fisher matrix of 12 rows has rank 12."""
    sketched = found("nystroem", matrix="empirical-fisher", rank=13, absolute_damping=0.05)
    agree(sketched.values, found("empirical-fisher", absolute_damping=0.05).values, 1e-8)


def test_near_the_matrix_it_saves_steps():
    steps = {}
    for near in ("none", "nystroem"):
        scores = found("cg", near=near, rank=100, absolute_damping=0.01, tolerance=1e-8)
        agree(scores.values, ORACLES["cg"](trained(), absolute_damping=0.01), 1e-6)
        steps[near] = scores.about["steps"]
    assert 2 * steps["nystroem"] <= steps["none"], steps


def test_a_matrix_that_may_curve_downwards_is_refused():
    with pytest.raises(UsageError, match="matrix can't be"):
        found("nystroem", matrix="hessian")


def test_several_processes_give_what_one_gives():
    """As do the other methods that multiply with the whole matrix."""
    expected = work.inverted(ROWS, QUERIES)
    for each in run(work.inverted, ROWS, QUERIES):
        for method, values in expected.items():
            agree(each[method], values, 1e-7)


def test_a_killed_sketch_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("whence.engine.search.SaveTimer.due", True)
    seen = killed_and_resumed(lambda out: found("nystroem", rank=96, out=out), tmp_path, "solve", 3)
    assert seen.resumed["solve"] == [2]

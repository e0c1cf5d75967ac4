"""Leading eigenpairs by Arnoldi's iteration: the published form, and with the complement that it lacks."""

import numpy as np
import pytest
from inverses import found, trained
from killing import killed_and_resumed
from oracle import agree

from benchmarks.oracles.curvature import ORACLES
from whence.errors import UsageError


@pytest.mark.parametrize("settings", [{}, {"complement": False}, {"matrix": "hessian"}, {"damping": "training"}], ids=str)
def test_it_is_its_oracle(settings):
    settings = settings if "damping" in settings else {**settings, "absolute_damping": 0.05}
    scores = found("arnoldi", top=20, vectors=120, **settings)
    agree(scores.values, ORACLES["arnoldi"](trained(), top=20, **settings), 1e-6)
    assert scores.about["eigenvalues"] == 20 and scores.about["largest"] > 0


def test_with_all_eigenpairs_it_is_the_exact_inverse():
    agree(found("arnoldi", top=400, vectors=400, block=8).values, ORACLES["cg"](trained()), 1e-8)


def correlation(scores, others):
    return np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(scores.values, others.values, strict=True)])


def test_with_the_complement_it_is_nearer_to_the_exact_inverse_than_without():
    """In correlation, at every number of eigenpairs; without it directions of small curvature are lost, where most is moved."""
    for damping in (0.01, 0.1):
        exact = found("gauss-newton", absolute_damping=damping)
        for top in (5, 20, 50):
            with_it, without = (
                found("arnoldi", top=top, vectors=60, absolute_damping=damping, complement=complement)
                for complement in (True, False)
            )
            assert correlation(with_it, exact) > correlation(without, exact) + 0.005


def test_published_it_has_no_damping_and_with_the_complement_needs_one():
    scores = found("arnoldi", top=10, complement=False, damping=0.0)
    agree(scores.values, ORACLES["arnoldi"](trained(), top=10, complement=False, absolute_damping=1e-12), 1e-6)
    with pytest.raises(UsageError, match="complement"):
        found("arnoldi", damping=0.0)


def test_a_killed_search_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("whence.engine.search.SaveTimer.due", True)
    seen = killed_and_resumed(lambda out: found("arnoldi", top=10, vectors=24, out=out), tmp_path, "solve", 4)
    assert seen.resumed["solve"] == [3]

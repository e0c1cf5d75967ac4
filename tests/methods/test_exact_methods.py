"""Dense damped inverses are those of autograd's matrices, whatever the matrix and the damping."""

import pytest
from inverses import found, trained
from killing import killed_and_resumed
from oracle import agree

from benchmarks.oracles.curvature import ORACLES
from whence.errors import NumericalError, StaleArtifact, UsageError
from whence.methods import dense

KINDS = ("hessian", "gauss-newton", "fisher", "empirical-fisher")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [{"absolute_damping": 0.05}, {"damping": "training"}], ids=["number", "training"])
def test_it_is_its_oracle(kind, damping):
    scores = found(kind, **damping)
    agree(scores.values, ORACLES[kind](trained(), **damping), 1e-8)
    assert scores.unit == "nats per copy" and "inverse with damping" in scores.about["operator"]
    assert ("metric of Adam" in scores.about["operator"]) == ("damping" in damping)


def test_a_damping_is_in_units_of_the_mean_eigenvalue():
    agree(found("gauss-newton", damping=0.5).values, ORACLES["gauss-newton"](trained(), damping=0.5), 1e-8)
    flat = trained().gauss_newton_PP
    agree(
        found("gauss-newton", absolute_damping=0.5 * float(flat.trace()) / len(flat)).values,
        found("gauss-newton", damping=0.5).values,
        1e-8,
    )


def test_a_hessian_that_curves_downwards_is_said_to(notes):
    found("hessian", absolute_damping=1e-4)
    assert any("scores are of a saddle" in text for text in notes)
    found("gauss-newton", absolute_damping=1e-4)
    assert sum("saddle" in text for text in notes) == 1
    with pytest.raises(NumericalError, match="not above zero"):
        dense.mean_eigenvalue(-trained().gauss_newton_PP)


def test_too_many_weights_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(dense, "LARGEST", 300)
    with pytest.raises(UsageError, match="356 weights") as raised:
        found("fisher")
    assert "method cg with matrix=fisher" in str(raised.value)


def test_a_killed_run_resumes_and_another_damping_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("whence.engine.search.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("whence.engine.search.SaveTimer.due", True)
    seen = killed_and_resumed(lambda out: found("fisher", out=out), tmp_path, "solve", 4)
    assert seen.resumed["solve"] == [3]
    with pytest.raises(StaleArtifact, match="damping"):
        found("fisher", out=tmp_path / "whole", damping=0.2)

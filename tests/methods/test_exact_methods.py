"""Dense damped inverses are those of autograd's matrices, whatever the matrix and the damping."""

import numpy as np
import pytest
from inverses import Killed, Killer, found, trained
from oracle import agree

from benchmarks.oracles.curvature import ORACLES
from whence.errors import NumericalError, StaleArtifact, UsageError
from whence.methods import dense
from whence.progress import report_to

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
    whole = found("fisher", out=tmp_path / "whole")
    with pytest.raises(Killed), report_to(Killer(4)):
        found("fisher", out=tmp_path / "killed")
    with report_to(seen := Killer(-1)):
        np.testing.assert_array_equal(found("fisher", out=tmp_path / "killed").raw, whole.raw)
    assert seen.resumed == [3]
    assert {file.name for file in (tmp_path / "killed").iterdir()} == {file.name for file in (tmp_path / "whole").iterdir()}
    with pytest.raises(StaleArtifact, match="damping"):
        found("fisher", out=tmp_path / "whole", damping=0.2)

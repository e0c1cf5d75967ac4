"""LiSSA is its truncated series, comes to the damped inverse where its scale allows, and says so where it doesn't."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from distributed import work
from distributed.processes import run
from killing import killed_and_resumed
from models import CASES
from oracle import agree

from benchmarks.oracles.base import Case
from benchmarks.oracles.curvature import cg, solved
from benchmarks.oracles.stochastic import ORACLES
from whence.engine.partition import SaveTimer
from whence.errors import NumericalError
from whence.methods.base import attribute
from whence.settings import Score
from whence.store.scores import Scores

TINY = CASES["mlp"]
SETTINGS: dict[str, Any] = {"absolute_damping": 0.05, "scale": 4.0, "depth": 20}


@pytest.fixture(scope="module")
def case():
    return Case(TINY.model(), TINY.task(), TINY.train(), TINY.queries(), modules="all")


def scores(case: Case, method: Any = "lissa", settings: Any = Score(), **own: Any) -> Scores:
    return attribute(method, case.model, case.task, case.queries, case.rows, settings, **own)


def test_it_is_its_oracle(case):
    for chosen in ({"batch": 14}, {"batch": 4, "repeats": 2, "seed": 3}):
        found = scores(case, **(SETTINGS | chosen))
        agree(found.values, ORACLES["lissa"](case, **SETTINGS, **chosen), 1e-8)
    assert found.unit == "nats per copy" and "by LiSSA" in found.about["operator"]
    assert found.about["steps"] == 40 and found.about["passes"] == pytest.approx(40 * 4 / 14) and found.about["scale"] == 4.0
    assert 0 < found.about["residual"] < 1


def test_it_comes_to_the_damped_inverse_with_its_sign_and_its_scale(case):
    damped: dict[str, Any] = {"absolute_damping": 0.5, "batch": 14, "depth": 80}
    exact = cg(case, **damped)
    ways: list[dict[str, Any]] = [{}, {"near": "ekfac"}, {"scale": 3.0}]
    for chosen in ways:
        found = scores(case, **damped, **chosen)
        agree(found.values, exact, 1e-5)
        assert found.about["residual"] < 1e-5
    relative = scores(case, **{**damped, "absolute_damping": None, "damping": 10.0})
    assert np.corrcoef(relative.values.ravel(), cg(case, damping=10.0).ravel())[0, 1] > 0.999
    early = scores(case, **damped, tolerance=1e-3)
    assert early.about["steps"] < 60 and early.about["residual"] < 2e-3


def test_the_form_that_others_release_damps_by_their_damp_times_their_scale(case):
    """`h <- v + (1 - d) h - G h / sigma`, as in jax-influence and FastIF, is ours with a damping of `d sigma`."""
    h = case.m_QP
    for _ in range(10):
        h = case.m_QP + (1 - 0.02) * h - h @ case.gauss_newton_PP / 4
    found = scores(case, absolute_damping=0.02 * 4, scale=4.0, depth=10, batch=14)
    agree(found.raw, h / 4 @ case.g_NP.T, 1e-8)


def test_other_matrices(case):
    for kind in ("empirical-fisher", "fisher", "hessian"):
        found = scores(case, absolute_damping=2.0, batch=14, depth=60, matrix=kind)
        agree(found.values, cg(case, absolute_damping=2.0, matrix=kind), 1e-5)


def test_a_fixed_batch_would_be_another_matrix(case):
    """What averages out are fresh rows: the steps come near the inverse of the whole, not that of the first few rows."""
    damped = {"absolute_damping": 0.5, "depth": 100, "batch": 4}
    exact, few = cg(case, **damped), Case(case.model, case.task, case.rows[:4], case.queries, modules="all")
    found = scores(case, "astra", **damped).values
    other = solved(case, few.gauss_newton_PP, torch.full_like(case.problem.theta, 0.5))
    assert np.abs(found - exact).max() < 0.2 * np.abs(other - exact).max()


def test_a_scale_that_is_too_small_raises_and_names_one_that_converges(case):
    damped = {"absolute_damping": 0.05, "batch": 14, "depth": 100}
    top = float(torch.linalg.eigvalsh(case.gauss_newton_PP).max()) + 0.05
    with pytest.raises(NumericalError, match="diverge") as raised:
        scores(case, **damped, scale=0.3 * top)
    (named,) = re.findall(r"a scale of ([\d.e+-]+)", raised.value.fix)
    assert float(named) == pytest.approx(top, rel=0.05)
    assert scores(case, **damped, scale=float(named)).about["residual"] < 0.5
    with pytest.raises(NumericalError, match="larger damping"):
        scores(case, **{**damped, "absolute_damping": 0.0}, matrix="hessian", scale=1.0)


def test_a_killed_search_resumes_to_the_same_bits(case, tmp_path, monkeypatch):
    monkeypatch.setattr(SaveTimer, "due", True)
    chosen = {**SETTINGS, "batch": 4}
    seen = killed_and_resumed(lambda out: scores(case, **chosen, out=out), tmp_path, "solve", 7)
    assert seen.resumed["solve"] == [6]


def test_several_processes_give_the_same(case):
    chosen = {**SETTINGS, "batch": 14, "depth": 5}
    expected = scores(case, settings=Score(batch_tokens=4), **chosen)
    for found in run(work.attributed, "lissa", "mlp", chosen, {"batch_tokens": 4}):
        agree(found, expected.values, 1e-10)

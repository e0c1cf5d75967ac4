"""ASTRA begins with EK-FAC and comes to the inverse of the whole damped matrix."""

from typing import Any

import numpy as np
import pytest
from distributed import work
from distributed.processes import run
from models import CASES
from oracle import agree

from benchmarks.oracles.base import Case
from benchmarks.oracles.stochastic import ORACLES
from whence.fitting import fit
from whence.methods.base import attribute
from whence.store.scores import Scores

TINY = CASES["mlp"]
DAMPED: dict[str, Any] = {"absolute_damping": 0.1}


@pytest.fixture(scope="module")
def case():
    return Case(TINY.model(), TINY.task(), TINY.train(), TINY.queries(), modules="all")


def scores(case: Case, method: Any = "astra", **own: Any) -> Scores:
    return attribute(method, case.model, case.task, case.queries, case.rows, **own)


def correlation(found, exact):
    return min(np.corrcoef(a, b)[0, 1] for a, b in zip(found.values, exact, strict=True))


def test_it_comes_to_its_oracle(case):
    found = scores(case, batch=14, depth=150, **DAMPED)
    agree(found.values, ORACLES["astra"](case, batch=14, **DAMPED), 1e-3)
    assert found.about["residual"] < 1e-2 and "by ASTRA" in found.about["operator"]


def test_few_rows_a_step_refine_ekfac(case):
    exact, curvature = ORACLES["astra"](case, **DAMPED), fit(case.model, case.task, case.rows, examples="all", disjoint=False)
    alone = scores(case, "ekfac", factors=curvature, **DAMPED)
    found = scores(case, batch=4, depth=70, seed=2, factors=curvature, **DAMPED)
    last = scores(case, batch=4, depth=70, seed=2, factors=curvature, averaging=1e6, **DAMPED)
    error = lambda scores: np.abs(scores.values - exact).max()  # noqa: E731
    assert correlation(alone, exact) < 0.95 and correlation(found, exact) > 0.998
    assert error(found) < 0.7 * error(last) < 0.7 * error(alone)
    assert found.about["passes"] == 20


def test_it_begins_with_ekfac(case):
    """With steps that are as short as nothing it is EK-FAC."""
    curvature = fit(case.model, case.task, case.rows, examples="all", disjoint=False)
    found = scores(case, batch=4, depth=1, scale=1e12, factors=curvature, **DAMPED)
    agree(found.values, scores(case, "ekfac", factors=curvature, **DAMPED).values, 1e-8)


def test_several_processes_give_the_same(case):
    chosen = {**DAMPED, "batch": 14, "depth": 4}
    expected = scores(case, **chosen)
    for found in run(work.attributed, "astra", "mlp", chosen):
        agree(found, expected.values, 1e-8)

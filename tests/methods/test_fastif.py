"""FastIF scores the rows near the queries, with the matrix of all rows, and says how it damps."""

from typing import Any

import numpy as np
import pytest
from distributed import work
from distributed.processes import run
from killing import killed_and_resumed
from models import CASES
from oracle import agree

from benchmarks.oracles.base import Case
from benchmarks.oracles.stochastic import ORACLES
from whence.engine.partition import SaveTimer
from whence.errors import UsageError
from whence.methods.base import attribute
from whence.store.scores import Scores

TINY = CASES["llama"]
MODULE = "model.layers.1.mlp.down_proj"
STEPS: dict[str, Any] = {"absolute_damping": 0.5, "scale": 8.0, "depth": 6, "batch": 4}


@pytest.fixture(scope="module")
def case():
    return Case(TINY.model(), TINY.task(), TINY.train(), TINY.queries())


def scores(case: Case, **own: Any) -> Scores:
    return attribute("fastif", case.model, case.task, case.queries, case.rows, **own)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_it_is_its_oracle(case, distance):
    chosen = {**STEPS, "candidates": "2", "distance": distance}
    found, expected = scores(case, **chosen), ORACLES["fastif"](case, **chosen)
    near = np.flatnonzero(~np.isnan(expected[0]))
    assert 2 <= len(near) <= 6
    agree(found.values, expected[:, near], 1e-8)
    assert len(found.example_ids) == len(near)
    assert found.n_train == len(case.rows) and found.unit == "nats per copy"
    about = found.about["candidates"]
    assert (about["of"], about["scored"], about["left_out"]) == (10, len(near), 10 - len(near))
    assert (
        about["text"] == "embedding-knn:2" and found.about["damp"] == pytest.approx(0.5 / 8) and found.about["damping"] == 0.5
    )


def test_all_rows_are_lissa(case):
    expected = attribute("lissa", case.model, case.task, case.queries, case.rows, **STEPS)
    agree(scores(case, candidates="100%", **STEPS).raw, expected.raw, 1e-12)


def test_a_killed_run_resumes_and_several_processes_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(SaveTimer, "due", True)
    tiny, chosen = CASES["mlp"], {**STEPS, "candidates": "3"}
    case = Case(tiny.model(), tiny.task(), tiny.train(), tiny.queries(), modules="all")
    seen = killed_and_resumed(lambda out: scores(case, **chosen, out=out), tmp_path, "solve", 4)
    assert seen.resumed["solve"] == [3]
    for found in run(work.attributed, "fastif", "mlp", chosen):
        agree(found, scores(case, **chosen).values, 1e-10)


def test_what_can_not_be_a_number_of_rows(case):
    with pytest.raises(UsageError, match="candidates can't be 'many'"):
        scores(case, candidates="many", **STEPS)

"""UnTrac is ascent on the loss of a group, and UnTrac-Inv on that of a query, step by step."""

import numpy as np
import pytest
import torch
from distributed import work
from distributed.processes import run
from killing import killed_and_resumed
from models import CASES, llama, randomised, texts, tokenizer
from oracle import agree

from benchmarks.oracles.base import Case
from benchmarks.oracles.unlearning import ORACLES
from whence.data import as_rows
from whence.errors import UsageError
from whence.methods.base import attribute
from whence.tasks import CausalLM

QUERIES = as_rows(texts(6, seed=2)[::2])
PLAIN = as_rows(texts(6, seed=1))
ROWS = as_rows([{**row, "source": "abc"[number % 3]} for number, row in enumerate(texts(8, seed=1))])


def case_of(rows, model=None):
    return Case(model or randomised(llama()).double().eval(), CausalLM(tokenizer()), rows, QUERIES)


def found_by(method, case, **settings):
    return attribute(method, case.model, case.task, QUERIES, case.rows, **settings)


@pytest.mark.parametrize(
    ("method", "rows", "settings", "unit"),
    [
        ("untrac", ROWS, {"learning_rate": 1e-3}, "nats per row unlearned"),
        ("untrac", ROWS, {"epochs": 2, "batch_size": 2, "learning_rate": 1e-3, "seed": 5}, "nats per row unlearned"),
        ("untrac", PLAIN, {}, "nats per row unlearned"),
        ("untrac-inv", ROWS, {"learning_rate": 1e-3}, "nats of the row's loss"),
        ("untrac-inv", PLAIN, {"steps": 2}, "nats of the row's loss"),
    ],
)
def test_it_is_its_oracle(method, rows, settings, unit):
    case = case_of(rows)
    before = {name: weight.clone() for name, weight in case.model.state_dict().items()}
    found = found_by(method, case, **settings)
    agree(found.values, ORACLES[method](case, **settings), 1e-6)
    assert found.unit == unit and found.directed
    assert all(torch.equal(weight, before[name]) for name, weight in case.model.state_dict().items())
    assert all(weight.requires_grad for weight in case.model.parameters())


def test_rows_of_a_source_share_what_unlearning_it_costs():
    found = found_by("untrac", case_of(ROWS), learning_rate=1e-3)
    assert found.about["operator"] == "UnTrac, 3 groups"
    for source in "abc":
        of_source = found.values[:, (found.examples["source"] == source).to_numpy()]
        assert np.ptp(of_source, axis=1).max() == 0
    assert found_by("untrac", case_of(ROWS), groups="rows").about["operator"] == "UnTrac, 8 groups"


def test_unlearning_what_is_asked_loses_it():
    case = case_of(QUERIES)
    for method, settings in (("untrac", {"groups": "rows"}), ("untrac-inv", {})):
        values = found_by(method, case, **settings).values
        assert (np.diag(values) > 0).all() and (np.argmax(values, 1) == np.arange(3)).all()


def test_short_formats_are_unlearned_in_float32():
    exact, short = (case_of(ROWS, randomised(llama()).to(dtype).eval()) for dtype in (torch.float32, torch.bfloat16))
    for method in ("untrac", "untrac-inv"):
        expected, found = (found_by(method, case).values for case in (exact, short))
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("method", ["untrac", "untrac-inv"])
def test_a_killed_run_resumes_to_the_same_bits(method, tmp_path, monkeypatch):
    monkeypatch.setattr("whence.engine.trials.SaveTimer.due", True)
    case = case_of(ROWS)
    seen = killed_and_resumed(lambda out: found_by(method, case, out=out), tmp_path, "unlearning", 3)
    assert seen.resumed["unlearning"] == [2] and not (tmp_path / "killed" / "unlearned").exists()


def test_several_processes_give_the_same():
    for method in ("untrac", "untrac-inv"):
        expected = found_by(method, case_of(ROWS)).values
        for found in run(work.by_method, method, ROWS, QUERIES):
            agree(found, expected, 1e-9)


def test_sources_that_are_not_there():
    with pytest.raises(UsageError, match="no source"):
        found_by("untrac", case_of(PLAIN), groups="source")
    mlp = CASES["mlp"]
    found = attribute("untrac", mlp.model(), mlp.task(), mlp.queries(), mlp.train())
    assert found.about["operator"] == "UnTrac, 14 groups" and np.isfinite(found.values).all()

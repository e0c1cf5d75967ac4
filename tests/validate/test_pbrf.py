"""The proximal Bregman response against its definition, and influence against it."""

import dataclasses

import numpy as np
import oracle
import pytest
import torch
from exact import exact_scores
from models import CASES
from torch import nn

from whence.errors import StaleArtifact, UsageError
from whence.linalg.stats import agree
from whence.tasks import Classification, Regression
from whence.tasks.outputs import Outputs
from whence.validate import pbrf
from whence.validate.exact import gauss_newton
from whence.validate.ladder import LADDER
from whence.validate.methods import EXACT, NAMES
from whence.validate.minimise import minimise
from whence.validate.objectives import Objectives, solve_row
from whence.validate.pbrf import check_pbrf
from whence.validate.problem import Problem
from whence.validate.settings import Setting
from whence.validate.trainer import Recipe


def net():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))


def built(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return net().eval()


@pytest.fixture
def tiny():
    """Forty points of three classes; a net of two layers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 3, generator=generator)
    pairs = [(x[i], int((x[i, 0] + x[i, 1] ** 2 > 0.7) + (x[i, 2] > 0.5))) for i in range(48)]
    recipe = Recipe(0.2, 30, 8, "momentum", weight_decay=1e-3)
    return Setting("tiny", "tiny: 3-6-3 tanh", built, Classification(), pairs[:40], pairs[40:], recipe)


def smooth():
    """The classifier of the cases with a tanh for its ReLU, whose kinks are in no derivative."""
    case = CASES["mlp"]
    model = case.model()
    model[3] = nn.Tanh()
    return model, case.task(), case.train(), case.queries()


def objectives(relative=0.3):
    problem = Problem(*smooth())
    curvature = gauss_newton(problem, "dense")
    return Objectives(problem, curvature.inverse(curvature.damping(relative).absolute))


@pytest.mark.parametrize("family", ["softmax", "gaussian"])
def test_divergence_is_the_bregman_divergence_of_the_loss(family):
    h, s = torch.randn(4, 1, 5, dtype=torch.float64), torch.randn(4, 1, 5, dtype=torch.float64)
    label = torch.tensor([0, 3, 1, 1]) if family == "softmax" else torch.randn(4, 5, dtype=torch.float64)
    loss = (
        (lambda y: nn.functional.cross_entropy(y[:, 0], label, reduction="none"))
        if family == "softmax"
        else (lambda y: (y[:, 0] - label).square().sum(1) / 2)
    )
    at = s.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(at).sum(), at)
    expected = loss(h) - loss(s) - (slope * (h - s)).sum((1, 2))
    labels = label[:, None]
    oracle.agree(Outputs(h, labels, family).losses(), loss(h), 1e-12)
    oracle.agree(Outputs(h, labels, family).divergence(Outputs(s, labels, family)), expected, 1e-12)


@pytest.mark.parametrize("family", ["softmax", "gaussian"])
def test_curvature_of_outputs_is_the_second_derivative_of_the_divergence(family):
    s, u = torch.randn(1, 2, 4, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    counted = torch.tensor([[True, False]]) if family == "softmax" else torch.tensor([[True, True]])
    labels = torch.tensor([[1, -100]]) if family == "softmax" else torch.zeros(1, 2, 4, dtype=torch.float64)
    target = Outputs(s, labels, family)
    hessian = torch.autograd.functional.hessian(lambda h: Outputs(h, labels, family).divergence(target).sum(), s)
    oracle.agree(target.curve(u).flatten(), hessian.reshape(8, 8) @ u.flatten(), 1e-10)
    root = target.root()
    oracle.agree((root @ root.mT @ u[..., None])[..., 0] * counted[..., None], target.curve(u), 1e-12)


def test_gradients_of_the_objectives():
    own = objectives()
    at = own.problem.theta + 0.1 * torch.randn_like(own.problem.theta)
    along = torch.randn_like(at)
    own.weight_decay = 0.3
    for function in (own.bregman(3, 0.02), own.proximal(3, -0.02)):
        change = (function(at + 1e-5 * along)[0] - function(at - 1e-5 * along)[0]) / 2e-5
        assert float(change) == pytest.approx(float(function(at)[1] @ along), rel=1e-6)
    value, gradient = own.bregman(None, 0.0)(own.problem.theta)
    assert float(value) == 0 and float(gradient.norm()) < 1e-12, "the trained weights are the minimum without a row"


def test_minimum_of_a_quadratic_takes_one_step_with_its_own_inverse_and_more_without():
    matrix = torch.diag(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
    goal = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def function(x):
        return (x - goal) @ matrix @ (x - goal) / 2, matrix @ (x - goal)

    start = torch.zeros(3, dtype=torch.float64)
    found = minimise(function, start, lambda v: v / matrix.diagonal(), 1e-10)
    assert found.steps == 1 and found.converged
    plain = minimise(function, start, lambda v: v, 1e-10)
    assert plain.converged and plain.steps > 1
    oracle.agree(plain.theta, goal, 1e-10)
    assert not minimise(function, start, lambda v: v, 1e-10, steps=1).converged


def test_exact_influence_is_the_limit_of_the_pbrf():
    own = objectives()
    rows = range(6)
    found = [solve_row(own, row, (0.1, 0.01)) for row in rows]
    effects = torch.stack([(row.plus_EQ[1] - row.minus_EQ[1]) / (2 * 0.01) for row in found], dim=1).numpy()
    model, task, train, queries = smooth()
    scores = exact_scores(model, task, queries, train, absolute=own.absolute)
    exact = scores.values[:, list(rows)]
    assert agree(exact, effects).pearson > 0.9999
    oracle.agree(effects, exact, 2e-2)
    assert agree(-exact, effects).pearson < -0.999, "a wrong sign is seen"
    shuffled = np.random.default_rng(0).permutation(exact.T).T
    assert agree(shuffled, effects).pearson < 0.9, "wrong rows are seen"
    coarse = torch.stack([(row.plus_EQ[0] - row.minus_EQ[0]) / (2 * 0.1) for row in found], dim=1).numpy()
    assert np.abs(coarse - exact).max() > np.abs(effects - exact).max(), "a larger change is further from the limit"


def correlation(found, method=EXACT):
    """With the PBRF at the smallest change, at the first damping."""
    return found.row(method=method)["pearson"]


def test_check_says_what_agrees_and_what_not(tiny, monkeypatch):
    given, plain = [], pbrf.pbrf_result
    monkeypatch.setattr(pbrf, "pbrf_result", lambda *own: given.extend(own) or plain(*own))
    found = check_pbrf(tiny, rows=8, large=5, queries=5, dampings=(0.5,))
    about, (own,), ladders, _ = given
    assert correlation(found) > 0.999 and "agrees" in found.says[1]
    convergence = found.tables["Convergence in the size of the change"]
    assert convergence[-1]["relative_error"] < convergence[0]["relative_error"]
    assert convergence[-1]["residual"] < 1e-5
    assert [row["rows"] for row in convergence] == [5, 5, 8], "large changes are tried on some rows"
    table = found.tables["Agreement with the PBRF"]
    behind = {row["method"]: row.get("behind_ekfac") for row in table}
    assert behind["gradient dot"] == pytest.approx(correlation(found, "EK-FAC") - correlation(found, "gradient dot"))
    assert {row["method"] for row in table} == {EXACT, *NAMES.values()}
    assert max(correlation(found, name) for name in NAMES.values()) < correlation(found), (
        "no approximation is as close as the exact one"
    )
    stand_in = found.tables["Agreement with exact influence, all 40 rows"]
    assert {row["method"] for row in stand_in} == set(NAMES.values())
    np.testing.assert_array_equal(own.whole["EK-FAC"][:, about["rows"]], own.scores["EK-FAC"])
    assert own.whole[EXACT].shape == (5, 40) and "By the exact influence of all 40 rows: EK-FAC" in found.says[3]
    assert stand_in[0]["pearson"] == agree(own.whole["EK-FAC"], own.whole[EXACT]).pearson
    for ladder in ladders:
        rows = ladder.table()
        assert [row["objective"] for row in rows] == list(LADDER) and rows[-1]["pearson_influence"] == pytest.approx(1)
        assert rows[2]["gap_to_next"] == pytest.approx(np.abs(ladder.of(LADDER[2]) - ladder.of(LADDER[3])).mean()), (
            "gaps are mean differences"
        )
    page, document = found.markdown(), found.as_json()
    assert "| + proximity |" in page and document["tables"]["Agreement with the PBRF"][0]["pearson"] > 0.999
    for spoil in (lambda x: -x, lambda x: np.random.default_rng(0).permutation(x.T).T):
        solved = dataclasses.replace(own, scores={EXACT: spoil(own.scores[EXACT])})
        assert "does NOT agree" in plain(about, [solved]).says[1]


def test_regression_uses_squared_distances(tiny):
    pairs = [(x, torch.tensor([float(x[0] * x[1]), float(x[2])])) for x, _ in (*tiny.train, *tiny.queries)]

    def model(seed):
        return nn.Sequential(*built(seed)[:2], nn.Linear(6, 2))

    torch.manual_seed(0)
    recipe = Recipe(0.1, 20, 8)
    setting = Setting("pairs", "pairs", model, Regression(), pairs[:40], pairs[40:], recipe)
    found = check_pbrf(setting, rows=6, queries=4, dampings=(0.5,), epsilons=(0.01,), methods=("identity",), ladder=False)
    assert correlation(found) > 0.999 and not found.arrays["ladders"]


def test_killed_check_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    settings = {"rows": 4, "queries": 3, "dampings": (0.5,), "epsilons": (0.1, 0.01), "methods": ("identity",)}
    solved, plain = [], pbrf.solve_row

    def counted(own, row, epsilons):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(row)
        return plain(own, row, epsilons)

    monkeypatch.setattr(pbrf, "solve_row", counted)
    with pytest.raises(KeyboardInterrupt):
        check_pbrf(tiny, **settings, out=tmp_path / "pbrf")
    first = list(solved)
    solved.clear()
    found = check_pbrf(tiny, **settings, out=tmp_path / "pbrf")
    assert len(solved) == 2 and not set(solved) & set(first), "two were kept, two were left"
    monkeypatch.setattr(pbrf, "solve_row", plain)
    fresh = check_pbrf(tiny, **settings)
    np.testing.assert_array_equal(found.arrays["effects"][0]["pbrf"], fresh.arrays["effects"][0]["pbrf"])
    with pytest.raises(StaleArtifact):
        check_pbrf(tiny, **{**settings, "queries": 4}, out=tmp_path / "pbrf")


def test_mistakes_are_named(tiny):
    with pytest.raises(UsageError, match="no method"):
        check_pbrf(tiny, methods=("lissa",))
    with pytest.raises(UsageError, match="must decrease"):
        check_pbrf(tiny, epsilons=(0.01, 0.1))

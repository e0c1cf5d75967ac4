"""The exact damped Gauss-Newton matrix against its definition."""

import oracle
import pytest
import torch
from exact import exact_scores
from models import CASES
from torch import nn

import whence
from whence.engine.stream import encode
from whence.errors import NumericalError, UsageError
from whence.tasks import Classification, Regression
from whence.validate.exact import gauss_newton, iterative
from whence.validate.problem import Problem


def problem_of(name, **settings):
    case = CASES[name]
    return Problem(case.model(), case.task(), case.train(), case.queries(), **settings)


def regression(rows=12, outputs=2):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    return model, Regression(), [(draw(3), draw(outputs)) for _ in range(rows)]


def solutions(problem):
    asked = torch.stack([problem.row_gradient(row) for row in problem.rows[:2]])
    return {way: gauss_newton(problem, way).inverse(0.03)(asked) for way in ("dense", "dual", "cg")}


@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_matrix_is_the_one_of_the_oracle_at_every_module(name):
    case = CASES[name]
    items = encode(case.task(), case.train()).items
    modules = ["model.layers.1.mlp.down_proj"] if case.text else ["0", "2", "4"]
    problem = Problem(case.model(), case.task(), case.train(), modules=modules)
    inputs = [oracle.text_logits(item) for item in items] if case.text else [lambda m, x=x: m(x[None]) for x, _ in items]
    expected = oracle.gauss_newton(case.model(), modules, inputs)
    eye = torch.eye(problem.size).to(problem.theta)
    found = problem.gauss_newton(eye)
    oracle.agree(gauss_newton(problem, "dense").inverse(0.1)(found + 0.1 * eye), eye, 1e-5)  # Llama's norms are in float32
    start = 0
    for name, matrix in expected.items():  # ours has weight, then bias; the oracle the bias as the weight's last column
        out, into = case.model().get_submodule(name).weight.shape
        bias = case.model().get_submodule(name).bias is not None
        places = torch.arange(start, start + out * (into + bias))
        weight, rest = places[: out * into].view(out, into), places[out * into :].view(out, -1)
        together = torch.cat([weight, rest], dim=1).flatten()
        oracle.agree(found[together][:, together], matrix, 1e-6)
        start += len(places)


@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_three_ways_are_one(name):
    problem = problem_of(name, modules="model.layers.1.mlp.down_proj" if name == "llama" else None)
    found = solutions(problem)
    oracle.agree(found["dual"], found["dense"], 1e-6)
    oracle.agree(found["cg"], found["dense"], 1e-6)


def test_three_ways_are_one_for_squared_error():
    found = solutions(Problem(*regression()))
    oracle.agree(found["dual"], found["dense"], 1e-8)
    oracle.agree(found["cg"], found["dense"], 1e-6)


def test_scores_follow_their_definition_and_the_engines_signs():
    case = CASES["mlp"]
    found = exact_scores(case.model(), case.task(), case.queries(), case.train(), absolute=1e9)
    dot = whence.score(
        case.model(),
        case.task(),
        case.queries(),
        case.train(),
        whence.fit(case.model(), case.task(), case.train(), method="identity").inverse(0.0),
    )
    oracle.agree(found.raw * 1e9, dot.raw, 1e-6)
    assert found.n_train == dot.n_train and found.example_ids == dot.example_ids and found.query_ids == dot.query_ids
    problem = problem_of("mlp")
    matrix = problem.gauss_newton(torch.eye(problem.size, dtype=torch.float64))
    damped = matrix + 0.1 * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=matrix.dtype)
    gradients = -torch.stack([problem.row_gradient(row) for row in problem.rows])
    expected = problem.query_gradients() @ torch.linalg.inv(damped) @ gradients.T
    relative = exact_scores(case.model(), case.task(), case.queries(), case.train(), damping=0.1)
    oracle.agree(relative.raw, expected)
    assert relative.about["residual"] < 1e-9


def test_estimated_trace_is_near():
    problem = problem_of("mlp")
    assert abs(gauss_newton(problem, "cg").trace / gauss_newton(problem, "dense").trace - 1) < 0.2


def test_mistakes_are_named():
    problem = problem_of("mlp")
    with pytest.raises(UsageError, match="above zero"):
        gauss_newton(problem).damping(0.0)
    with pytest.raises(UsageError, match="no way"):
        gauss_newton(problem, "lissa")
    with pytest.raises(NumericalError, match="residual"):
        iterative(problem, iterations=2)[1](1e-6)(problem.query_gradients())

    class Doubled(Classification):
        def losses(self, model, batch, noise=None):
            return 2 * super().losses(model, batch, noise)

    case = CASES["mlp"]
    with pytest.raises(UsageError, match="cross-entropy"):
        Problem(case.model(), Doubled(), case.train())


def test_model_stays_as_it_was():
    case = CASES["mlp"]
    model = case.model().float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [(x.float(), y) for x, y in case.train()]
    exact_scores(model, case.task(), data[:2], data)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())

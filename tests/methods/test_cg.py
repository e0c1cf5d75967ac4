"""Conjugate gradients for all queries at once, against the dense damped Gauss-Newton matrix in float64."""

import pytest
import torch
from distributed import work
from distributed.processes import run
from engine.test_products import language_model
from inverses import found, trained
from killing import killed_and_resumed
from models import texts, tokenizer
from oracle import agree

from benchmarks.oracles.curvature import MATRICES, ORACLES
from whence.engine.matrices import Fisher, GaussNewton, Hessian
from whence.engine.point import Point
from whence.engine.queries import encode_queries, precondition
from whence.errors import NumericalError, UsageError
from whence.fitting import fit
from whence.gradients import Dense
from whence.linalg.krylov import cg
from whence.methods.cg import ConjugateGradients, gauss_newton_inverse
from whence.operators import Identity
from whence.scoring import score, self_influence
from whence.scoring.score import score_points
from whence.tasks import CausalLM

ROWS, QUERIES = texts(12, seed=1), texts(6, seed=2)[::2]
MODELS = ("llama", "gpt2", "neox")
TIGHT = {"tolerance": 1e-11, "iterations": 500}


def setting(kind):
    """A point, and the curvature of its last layer's modules."""
    model, task = language_model(kind), CausalLM(tokenizer())
    return Point(model, task, ROWS), fit(model, task, ROWS, modules="last-1,all", examples="all", disjoint=False)


def dense(matrix):
    """A matrix in its columns, all modules together, and how to make one vector of gradients."""
    shapes = {name: site.shape for name, site in matrix.sites.items()}
    sizes = [o * i for o, i in shapes.values()]
    units = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
    given = {name: Dense(part.unflatten(1, shape)) for (name, shape), part in zip(shapes.items(), units, strict=True)}
    return flat(matrix @ given, shapes)


def flat(gradients, names):
    return torch.cat([gradients[name].dense().w_BOI.flatten(1) for name in names], 1)


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_the_dense_inverse(kind):
    point, curvature = setting(kind)
    operator = gauss_newton_inverse(point, curvature, damping=1.0, **TIGHT)
    names = operator.names
    matrix = dense(GaussNewton(point, names)) + curvature.mean_eigenvalue * torch.eye(
        sum(block.lam_OI.numel() for block in curvature.blocks.values()), dtype=torch.float64
    )
    asked, sites = encode_queries(point.task, QUERIES), point.cover(names).sites
    plain = precondition(point, asked, sites, Identity(names)).gradients
    solved = torch.linalg.solve(matrix, flat(plain, names).T).T
    agree(flat(precondition(point, asked, sites, operator).gradients, names), solved, 1e-6)
    rows = torch.cat(
        [flat(precondition(point, encode_queries(point.task, [row]), sites, Identity(names)).gradients, names) for row in ROWS]
    )
    found = score(point.model, point.task, QUERIES, ROWS, operator)
    agree(found.raw, solved @ rows.T, 1e-6)
    assert "inverse by conjugate gradients" in found.about["operator"]


@pytest.mark.parametrize("matrix", ["gauss-newton", "fisher", "empirical-fisher", "hessian"])
def test_at_a_residual_of_1e8_it_agrees_with_the_dense_inverse_to_1e6(matrix):
    """Of each matrix, damped far below the largest eigenvalues; the residual is told."""
    lowest = float(torch.linalg.eigvalsh(MATRICES[matrix](trained()))[0])
    damping = {"absolute_damping": max(0.01, -1.5 * lowest)}
    scores = found("cg", matrix=matrix, tolerance=1e-8, iterations=400, **damping)
    agree(scores.values, found(matrix, **damping).values, 1e-6)
    agree(scores.values, ORACLES["cg"](trained(), matrix=matrix, **damping), 1e-6)
    assert 0 < scores.about["residual"] <= 1e-8 and scores.about["steps"] > 5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_takes_a_third_of_the_steps_of_plain_conjugate_gradients_or_fewer(kind, notes):
    """For two dozen queries at once, whose directions serve each other."""
    point, curvature = setting(kind)
    operator = gauss_newton_inverse(point, curvature, tolerance=1e-3)
    names = operator.names
    asked = encode_queries(point.task, texts(48, seed=3)[::2])
    precondition(point, asked, point.cover(names).sites, operator)
    plain = precondition(point, asked, point.cover(names).sites, Identity(names)).gradients
    b = {name: plain[name].dense().w_BOI for name in names}
    alone = cg(operator.matrix.on_tensors(point.like), b, tolerance=1e-3, iterations=500).steps
    (steps,) = [int(text.split()[2]) for text in notes if text.startswith("conjugate gradients")]
    assert 3 * steps <= alone, (steps, alone)


def test_matrices():
    point, _ = setting("neox")
    names = ["gpt_neox.layers.1.mlp.dense_h_to_4h"]
    exact, hessian = dense(GaussNewton(point, names)), dense(Hessian(point, names))
    drawn = sum(dense(Fisher(point, names, seed=seed)) for seed in range(40)) / 40
    empirical = dense(Fisher(point, names, labels="data"))
    for matrix in (exact, drawn, empirical, hessian):
        agree(matrix, matrix.T, 1e-9)
    assert torch.linalg.eigvalsh(exact)[0] > -1e-12 and torch.linalg.eigvalsh(hessian)[0] < 0
    assert (drawn - exact).norm() < 0.3 * exact.norm() < (empirical - exact).norm()
    damped = GaussNewton(point, names) + 0.5 * Identity(names)
    assert not damped.blockwise and "0.5 x (identity)" in damped.label
    one = {names[0]: Dense(torch.randn(2, *point.cover(names).sites[names[0]].shape, dtype=torch.float64))}
    agree(flat(damped @ one, names), flat(one, names) @ (exact + 0.5 * torch.eye(len(exact))), 1e-9)


def test_a_killed_search_resumes_to_the_same_bits(tmp_path):
    point, curvature = setting("llama")

    def found(out):
        operator = gauss_newton_inverse(point, curvature, damping=10.0, out=out, save_every=0.0, **TIGHT)
        return score(point.model, point.task, QUERIES, ROWS, operator, out=out.with_suffix(".scores"))

    assert killed_and_resumed(found, tmp_path, "solve", 4).resumed["solve"] == [3]


def test_several_processes_solve_the_same():
    point, curvature = setting("llama")
    operator = gauss_newton_inverse(point, curvature, damping=1.0, tolerance=1e-10)
    expected = score(point.model, point.task, QUERIES, ROWS, operator).raw
    for each in run(work.solved, ROWS, QUERIES):
        agree(each, expected, 1e-8)


def test_what_needs_a_blockwise_operator_says_so():
    point, curvature = setting("llama")
    operator = gauss_newton_inverse(point, curvature)
    with pytest.raises(UsageError, match="acts on each module by itself"):
        self_influence(point.model, point.task, ROWS, operator)
    with pytest.raises(UsageError, match="acts on each module by itself"):
        score(point.model, point.task, QUERIES, ROWS, operator, norms=("relatif",))
    with pytest.raises(NumericalError, match="more iterations"):
        few = ConjugateGradients(operator.matrix, Identity(operator.names), tolerance=1e-10, iterations=2)
        score_points(point, point, QUERIES, few)


def test_products_are_not_shortened(notes):
    point, curvature = setting("llama")
    model = point.model.float()
    operator = gauss_newton_inverse(Point(model, point.task, ROWS), curvature, tolerance=1e-3)
    found = score(model, point.task, QUERIES, ROWS, operator, products="bfloat16")
    assert found.about["products"] == "float32" and any("multiplying in float32" in text for text in notes)


def test_other_ways_to_ask_give_the_same_numbers():
    point, curvature = setting("llama")
    operator = gauss_newton_inverse(point, curvature, damping=10.0, **TIGHT)  # so large that it takes few steps
    pairs = score(point.model, point.task, QUERIES, ROWS, operator).raw
    for settings, expected in (
        ({"per": "module"}, pairs),
        ({"aggregate": "queries"}, pairs.sum(0, keepdims=True)),
        ({"aggregate": "examples"}, pairs.sum(1, keepdims=True)),
        ({"rank": 1, "rescore": len(ROWS)}, pairs),
    ):
        agree(score(point.model, point.task, QUERIES, ROWS, operator, **settings).raw, expected, 1e-8)

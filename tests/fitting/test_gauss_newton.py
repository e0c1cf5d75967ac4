"""Against the Gauss-Newton matrix itself, from Jacobians: where EK-FAC is exact, and in the limit of many draws."""

import math

import pytest
import torch
from models import CASES, mlp, randomised
from oracle import agree, gauss_newton, log_likelihood, matrices_of, text_logits, traces
from torch import nn

from whence.engine.stream import encode
from whence.fitting import fit
from whence.scoring.score import score
from whence.tasks import Classification

P = torch.tensor([4, 2, 1, 1], dtype=torch.float64) / 8
LABELS = [0, 0, 0, 0, 1, 1, 2, 3]


def linear_with_one_output_distribution(x_NI):
    """A linear layer that predicts `P` whatever it reads, and data in which every input has each label as often as `P` says.

    The Gauss-Newton matrix of a linear layer with softmax on one position is `mean_n H_n kron x_n x_n^T` with
    `H_n = diag(p_n) - p_n p_n^T`. It is a Kronecker product if all `H_n` are the same, whatever the inputs; here
    `p_n = P`, since the weight is zero and the bias is log P. The output gradient for label y is `e_y - P`, so labels in
    the proportion of P make its covariance H with no sampling error, and because every input meets the same labels, inputs
    and output gradients are independent. Then the Fisher matrix of the data is the Gauss-Newton matrix, both of its
    factors are what the covariances measure, and so K-FAC and EK-FAC are exact.
    """
    layer = nn.Linear(x_NI.shape[1], len(P)).double()
    layer.weight.data.zero_()
    layer.bias.data = P.log()
    return nn.Sequential(layer), [(x_I, label) for x_I in x_NI for label in LABELS]


@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo"])
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_exact_damped_inverse_of_a_linear_layer(method, damping):
    x_NI = torch.randn(7, 5, dtype=torch.float64)
    model, train = linear_with_one_output_distribution(x_NI)
    curvature = fit(model, Classification(), train, method=method, labels="data")
    exact = gauss_newton(model, ["0"], [lambda model, x=x: model(x[None]) for x, _ in train])["0"]
    agree(matrices_of(curvature)["0"], exact)
    inverse = torch.linalg.inv(exact + damping * torch.eye(len(exact), dtype=exact.dtype))
    agree(curvature.inverse(absolute=damping).dense()["0"], inverse)
    relative = exact + damping * exact.diag().mean() * torch.eye(len(exact), dtype=exact.dtype)
    agree(curvature.inverse(damping).dense()["0"], torch.linalg.inv(relative))


def test_exact_influence_where_all_examples_are_one_position():
    """All examples read the same vector: the other case of one Kronecker product, `mean_n H_n kron x x^T`, for any weight."""
    model = randomised(nn.Sequential(nn.Linear(3, 4).double()))
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    model[0].bias.data = P.log() - model[0].weight.data @ x
    train = [(x, label) for label in LABELS]
    exact = gauss_newton(model, ["0"], [lambda model: model(x[None])] * len(train))["0"]
    curvature = fit(model, Classification(), train, labels="data")
    agree(matrices_of(curvature)["0"], exact)

    # one more copy of an example moves the damped optimum by (G + damping)^-1 g / N
    damping, n = 0.05, len(train)
    found = score(model, Classification(), [(x, 1)], train, curvature.inverse(absolute=damping))
    residual = torch.eye(4, dtype=torch.float64)[LABELS] - P
    w_NP = torch.einsum("no,i->noi", residual, torch.cat([x, torch.ones(1)])).flatten(1)
    solved = torch.linalg.solve(exact + damping * torch.eye(16, dtype=torch.float64), w_NP[4])
    agree(found.values, (w_NP @ solved)[None] / n)


def error(curvature, exact):
    """Of the diagonals, relative."""
    found = torch.cat([block.lam_OI.flatten() for block in curvature.blocks.values()])
    expected = torch.cat([exact[name].diag() for name in curvature.blocks])
    return float((found - expected).norm() / expected.norm())


def test_the_fisher_of_drawn_labels_converges_to_gauss_newton():
    """The error of a mean over draws falls with the root of their number: by 4 for 16 times the draws."""
    model, case = randomised(mlp().double()), CASES["mlp"]
    rows = case.train(6)
    exact = gauss_newton(model, ["0", "2", "4"], [lambda model, x=x: model(x[None]) for x, _ in rows])

    def mean_error(copies):
        seeds = range(6)
        return (
            sum(error(fit(model, Classification(), rows * copies, method="diagonal", seed=seed), exact) for seed in seeds) / 6
        )

    errors = [mean_error(copies) for copies in (4, 64, 1024)]
    assert errors[2] < 0.03
    for few, many in zip(errors, errors[1:], strict=False):
        assert 3 < few / many < 5.5, errors
    empirical = error(fit(model, Classification(), rows, method="diagonal", labels="data"), exact)
    assert empirical > 0.3, "the labels of the data have another Fisher matrix"


def test_the_fisher_of_sequences_converges_to_gauss_newton():
    """Labels of one row's tokens are drawn independently, so that the products between tokens cancel."""
    case = CASES["llama"]
    model, task, rows = case.model(), case.task(), case.train(3)
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    exact = gauss_newton(model, names, [text_logits(item) for item in encode(task, rows).items])
    errors = [error(fit(model, task, rows * copies, method="diagonal", modules=names), exact) for copies in (8, 128)]
    assert errors[1] < 0.12
    assert errors[0] / errors[1] > math.sqrt(16) / 2


def test_ekfac_is_the_best_diagonal_in_its_basis():
    """Its eigenvalues are the Fisher's diagonal in the Kronecker basis: none is closer (George et al. 2018)."""
    case = CASES["mlp"]
    model, rows = case.model(), case.train(300)
    curvatures = {
        method: fit(model, case.task(), rows, method=method, labels="data") for method in ("kfac", "ekfac", "diagonal")
    }
    found = traces(model, ["0", "2", "4"], [log_likelihood(row) for row in rows])
    for name in found[0]:
        w_NP = torch.stack([example[name].w_OI.flatten() for example in found])
        fisher = w_NP.T @ w_NP / len(w_NP)
        distance = {method: float((matrices_of(c)[name] - fisher).norm()) for method, c in curvatures.items()}
        assert distance["ekfac"] < distance["kfac"]
        assert torch.isclose(curvatures["ekfac"].blocks[name].lam_OI.sum(), fisher.trace())

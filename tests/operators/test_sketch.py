"""Masks and sparse projections against their matrices written out, and that they keep the mean of inner products."""

import pytest
import torch
from models import named
from operators.test_projection import gradients, noise_of, rows, shapes
from oracle import agree, matrix_of

from whence.fitting import fit
from whence.gradients import Dense, Factored
from whence.operators.projection import leading_eigenvectors
from whence.operators.sketch import masks, sparse_projections

cases = pytest.mark.parametrize("case", named("llama", "conv", "llama-embedding", "gpt2-norms"), ids=lambda case: case.name)


def written_out(masked, name):
    """Masks of a module as a matrix `[P_O * P_I, O * I]`."""
    n_out, n_in = masked.shapes[name]
    chosen = [torch.eye(n, dtype=torch.float64)[places] for n, places in ((n_out, masked.out[name]), (n_in, masked.into[name]))]
    return torch.kron(*chosen) * (n_out * n_in / (len(chosen[0]) * len(chosen[1]))) ** 0.5


@cases
def test_rows_are_the_gradients_times_the_matrices(case):
    """Of layers of all kinds: convolutions, embeddings and norms among them."""
    masked = masks(shapes(case), 3, seed=1)
    sparse, after = sparse_projections(shapes(case), 6, 1, nonzeros=2), sparse_projections(masked.sizes, 6, 1)
    dense = {name: each(torch.eye(len(each.order_SK[0]))).T.double() for name, each in sparse.sparse.items()}
    small = {name: each(torch.eye(len(each.order_SK[0]))).T.double() for name, each in after.sparse.items()}
    for operator, matrices in ((sparse, dense), (after @ masked, {n: m @ written_out(masked, n) for n, m in small.items()})):
        for name, matrix in matrices.items():
            agree(matrix_of(operator, name, shapes(case)[name]), matrix, 1e-6)
        expected = [w_NOI.flatten(1) @ matrices[name].T for name, w_NOI in gradients(case).items()]
        agree(rows(case, operator), torch.cat(expected, 1), 1e-5)


def test_masked_gradients_stay_factored():
    masked = masks({"a": (5, 4)}, 3, seed=0)
    gradient = Factored(torch.randn(2, 7, 5), torch.randn(2, 7, 4))
    (found,) = (masked @ {"a": gradient}).values()
    assert isinstance(found, Factored) and found.shape == (2, 3, 3)
    (formed,) = (masked @ {"a": gradient.dense()}).values()
    torch.testing.assert_close(found.dense().w_BOI, formed.w_BOI)


@pytest.mark.parametrize("kind", ["sparse", "masks", "both"])
def test_the_mean_over_seeds_is_the_inner_product(kind):
    (case,) = named("llama")

    def drawn(seed):
        masked = masks(shapes(case), 3, seed)
        both = sparse_projections(masked.sizes, 4, seed) @ masked
        return {"sparse": sparse_projections(shapes(case), 4, seed), "masks": masked, "both": both}[kind]

    given = {name: Dense(w_NOI) for name, w_NOI in gradients(case).items()}
    found = noise_of(case, [drawn(seed) @ given for seed in range(300)])
    assert (found.mean(0).abs() < 5 * found.std(0) / len(found) ** 0.5).all()
    assert found.std() > 0.1


def test_leading_eigenvectors_are_principal_components():
    (case,) = named("llama")
    curvature = fit(case.model(), case.task(), case.train(), method="kfac", modules=case.modules)
    projection = leading_eigenvectors(curvature.blocks, 3)
    for name, block in curvature.blocks.items():
        for found, q, lam in (
            (projection.out, block.q_O, block.lam_OI.sum(1)),
            (projection.into, block.q_I, block.lam_OI.sum(0)),
        ):
            covariance = (q.dense() * lam) @ q.dense().T
            values, vectors = torch.linalg.eigh(covariance.double())
            agree(found[name] @ found[name].T, vectors[:, -3:] @ vectors[:, -3:].T, 1e-4)
    whole = leading_eigenvectors(curvature.blocks, 100)
    for name in whole.out:
        agree(whole.out[name] @ whole.out[name].T, torch.eye(len(whole.out[name])), 1e-5)

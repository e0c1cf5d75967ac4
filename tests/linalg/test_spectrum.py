"""Leading eigenpairs against dense eigendecompositions, in float64."""

import pytest
import torch
from oracle import agree

from whence.linalg.spectrum import block_lanczos, largest_pairs, nystroem, random_vectors


def matrix(values):
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return q @ torch.diag(values) @ q.T


DECAYING = 2.0 ** -torch.arange(40, dtype=torch.float64)
LIKE = torch.empty(40, dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 3])
def test_lanczos_finds_leading_eigenpairs(block):
    values = DECAYING * (1 - 2 * (torch.arange(40) % 3 == 1))  # some are negative
    a = matrix(values)
    found, vectors = block_lanczos(lambda v: v @ a, random_vectors(block, LIKE), 30)
    agree(vectors @ vectors.T, torch.eye(30), 1e-12)
    top, v = largest_pairs(found, vectors, 8)
    agree(top, values[:8], 1e-10)
    agree(v @ a, top[:, None] * v, 1e-8)


def test_a_space_that_is_all_there_is_gives_the_matrix():
    a = matrix(torch.linspace(-1, 3, 40, dtype=torch.float64))
    values, vectors = block_lanczos(lambda v: v @ a, random_vectors(4, LIKE), 100)
    agree(vectors.T @ (values[:, None] * vectors), a, 1e-10)


def test_it_ends_where_the_space_is_invariant():
    a, products = matrix(torch.cat([torch.ones(3), torch.zeros(37)]).double()), []

    def multiply(v):
        products.append(len(v))
        return v @ a

    values, _ = block_lanczos(multiply, random_vectors(2, LIKE), 40)
    assert sum(products) == len(values) < 8 and (values > 0.5).sum() == 2, "of an eigenvalue threefold a start of two sees two"


def test_without_orthogonalising_twice_float32_would_lose_its_basis():
    a = matrix(DECAYING).float()
    _, vectors = block_lanczos(lambda v: v @ a, random_vectors(1, LIKE.float()), 30)
    agree(vectors @ vectors.T, torch.eye(len(vectors)), 1e-5)


def test_it_resumes_to_the_same_bits():
    a, states = matrix(DECAYING), []
    keep = lambda state, told: states.append({name: tensor.clone() for name, tensor in state.items()})  # noqa: E731
    whole = block_lanczos(lambda v: v @ a, random_vectors(3, LIKE), 20, after=keep)
    again = block_lanczos(lambda v: v @ a, random_vectors(3, LIKE), 20, state=states[2])
    assert len(states) == 7 and all(torch.equal(*pair) for pair in zip(whole, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sketch_is_the_matrix_where_its_rank_is_enough_and_below_it_elsewhere(dtype):
    values = torch.cat([torch.linspace(1, 2, 6), torch.zeros(34)]).double()
    a, omega = matrix(values).to(dtype), random_vectors(10, LIKE.to(dtype))
    found, vectors = nystroem(omega, omega @ a)
    agree(vectors.T @ (found[:, None] * vectors), a, 1e-10 if dtype == torch.float64 else 1e-5)
    a = matrix(DECAYING)
    omega = random_vectors(10, LIKE)
    found, vectors = nystroem(omega, omega @ a)
    left = torch.linalg.eigvalsh(a - vectors.T @ (found[:, None] * vectors))
    assert left[0] > -1e-12 and left[-1] < 4 * DECAYING[8], "it is below the matrix, by little more than what it leaves out"

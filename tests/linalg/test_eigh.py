import importlib

import numpy as np
import pytest
import torch

from whence.errors import NumericalError
from whence.linalg.eigh import eigh
from whence.precision import multiplying

solvers = importlib.import_module("whence.linalg.eigh")


@pytest.fixture(params=[False, True], ids=["torch", "numpy"], autouse=True)
def first(request, monkeypatch):
    """Whose LAPACK is asked first."""
    monkeypatch.setattr(solvers, "_numpy_is_faster", lambda: request.param)
    return "numpy" if request.param else "torch"


def covariance(n, rank, dtype=torch.float64):
    x = torch.randn(rank, n, dtype=dtype)
    return x.T @ x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [3, 12])
def test_decomposes_in_float64(dtype, rank):
    matrix = covariance(8, rank, dtype)
    values, vectors = eigh(matrix, "a layer")
    assert values.dtype == vectors.dtype == torch.float64
    assert (values >= 0).all() and (values.diff() >= 0).all()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_shorter_products_are_decomposed_in_their_own_format(dtype):
    matrix = covariance(40, 80, dtype)
    expected, _ = eigh(matrix, "a layer")
    with multiplying("bfloat16", matrix.device):
        values, vectors = eigh(matrix, "a layer")
    assert values.dtype == vectors.dtype == dtype
    torch.testing.assert_close(values.double(), expected, atol=1e-5 * float(expected[-1]), rtol=0)
    vectors, matrix = vectors.double(), matrix.double()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(40, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, atol=1e-5 * float(expected[-1]), rtol=0)


def test_a_matrix_that_rounding_made_asymmetric_or_indefinite():
    matrix = covariance(6, 2)
    matrix[0, 1] += 1e-9
    values, _ = eigh(matrix - 1e-12 * torch.eye(6, dtype=torch.float64), "a layer")
    assert (values >= 0).all() and (values[:4] < 1e-8).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named(broken):
    matrix = covariance(3, 3)
    matrix[1, 2] = broken
    with pytest.raises(NumericalError, match="covariance of layer.7 is not finite") as raised:
        eigh(matrix, "layer.7")
    assert "1 of 9" in str(raised.value) and raised.value.code == 14


def fail(monkeypatch):
    """Let both divide-and-conquer solvers diverge."""

    def failing(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    def diverging(*args, **kwargs):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(np.linalg, "eigh", diverging)


def test_the_faster_solver_is_asked_and_the_other_where_it_fails(monkeypatch, first):
    matrix, asked = covariance(6, 9), []
    solve = {"torch": torch.linalg.eigh, "numpy": np.linalg.eigh}
    expected, _ = eigh(matrix, "a layer")
    monkeypatch.setattr(torch.linalg, "eigh", lambda *args, **kwargs: asked.append("torch") or solve["torch"](*args, **kwargs))
    eigh(matrix, "a layer")
    assert asked == (["torch"] if first == "torch" else [])

    def diverging(*args, **kwargs):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(np.linalg, "eigh", diverging)
    values, vectors = eigh(matrix, "a layer")
    assert asked[-1:] == ["torch"]
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix)


def test_numpy_is_only_asked_in_place_of_mkl(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    solvers._numpy_is_faster.cache_clear()
    assert not solvers._numpy_is_faster()
    solvers._numpy_is_faster.cache_clear()


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_a_solver_that_fails_is_followed_by_a_slower_one_in_float64(monkeypatch, products):
    matrix = covariance(6, 9, torch.float32)
    expected, _ = eigh(matrix, "a layer")
    fail(monkeypatch)
    with multiplying(products, matrix.device):
        values, vectors = eigh(matrix, "a layer")
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix.double(), atol=1e-5, rtol=1e-5)


def test_where_all_solvers_fail_the_matrix_is_named(monkeypatch):
    import scipy.linalg

    def diverging(*args, **kwargs):
        raise scipy.linalg.LinAlgError("no")

    fail(monkeypatch)
    monkeypatch.setattr(scipy.linalg, "eigh", diverging)
    with pytest.raises(NumericalError, match="layer.7 did not converge"):
        eigh(covariance(4, 4), "layer.7")

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whence.linalg.project import kronecker_scales, mask, projection, sparse_projection


@settings(deadline=None)  # the first example imports numpy's generators
@given(width=st.integers(1, 40), dim=st.integers(1, 40), key=st.text(max_size=4))
def test_signs_of_unit_rows(width, dim, key):
    p = projection(width, dim, key)
    assert p.shape == (width, min(width, dim))
    assert torch.equal(p, projection(width, dim, key))
    if width <= dim:
        assert torch.equal(p, torch.eye(width))
    else:
        torch.testing.assert_close(p.abs(), torch.full((width, dim), dim**-0.5))


SIGNS = ["-----", "--+-+", "-+++-", "-+-+-", "+---+", "--+--", "++---"]


def test_the_bits_are_the_same_everywhere():
    signs = projection(7, 5, "a") > 0
    assert ["".join("+" if s else "-" for s in row) for row in signs.tolist()] == SIGNS
    assert not torch.equal(projection(7, 5, "a"), projection(7, 5, "b"))


def test_the_mean_of_p_p_transposed_is_the_identity():
    products = torch.stack([p @ p.T for p in (projection(9, 4, str(seed)) for seed in range(4000))])
    torch.testing.assert_close(products.mean(0), torch.eye(9), atol=5 * 0.5 / 4000**0.5, rtol=0)
    off_diagonal = products[:, 0, 1]
    assert off_diagonal.std() == pytest.approx(0.5, rel=0.05)  # 1 / sqrt(dim)


@given(n_out=st.integers(1, 6), n_in=st.integers(1, 6), seed=st.integers(0, 1000))
def test_scales_of_a_kronecker_product_are_its_factors(n_out, n_in, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.01 for n in (n_out, n_in))
    torch.testing.assert_close(torch.outer(*kronecker_scales(torch.outer(a, b))), torch.outer(a, b))


def test_scales_fit_the_logarithms():
    positive = torch.rand(5, 4, dtype=torch.float64) + 0.1
    left = positive.log() - torch.outer(*kronecker_scales(positive)).log()
    torch.testing.assert_close(left.mean(0), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(left.mean(1), torch.zeros(5, dtype=torch.float64))


@given(width=st.integers(1, 40), dim=st.integers(1, 6), nonzeros=st.integers(1, 3), key=st.text(max_size=4))
def test_columns_of_a_sparse_projection_have_so_many_signs_each(width, dim, nonzeros, key):
    sparse = sparse_projection(width, dim * nonzeros, key, nonzeros)
    matrix = sparse(torch.eye(width)).T
    assert matrix.shape == (min(width, dim * nonzeros), width)
    assert torch.equal(matrix, sparse_projection(width, dim * nonzeros, key, nonzeros)(torch.eye(width)).T)
    if width <= dim * nonzeros:
        assert torch.equal(matrix, torch.eye(width))
        return
    assert ((matrix != 0).sum(0) == nonzeros).all()
    torch.testing.assert_close(matrix.abs().amax(0), torch.full((width,), nonzeros**-0.5))
    loads = (matrix != 0).sum(1)
    assert loads.max() - loads.min() <= 1


@pytest.mark.parametrize("nonzeros", [1, 2])
def test_the_mean_of_s_transposed_s_is_the_identity(nonzeros):
    matrices = torch.stack([sparse_projection(9, 4, str(seed), nonzeros)(torch.eye(9)).T for seed in range(4000)])
    products = matrices.mT @ matrices
    torch.testing.assert_close(products.diagonal(dim1=1, dim2=2), torch.ones(4000, 9))
    torch.testing.assert_close(products.mean(0), torch.eye(9), atol=5 * 0.5 / 4000**0.5, rtol=0)


def test_the_bits_of_sparse_projections_and_masks_are_the_same_everywhere():
    sparse = sparse_projection(7, 2, "a")
    assert sparse.order_SK.tolist() == [[5, 3, 6, 1, 2, 0, 4]]
    assert sparse.signs_SK.tolist() == [[1, -1, 1, -1, 1, 1, 1]]
    assert (sparse.order_SK.dtype, sparse.signs_SK.dtype) == (torch.int32, torch.int8)  # five bytes an entry
    assert mask(9, 4, "a").tolist() == [3, 4, 6, 8]


@given(width=st.integers(1, 30), dim=st.integers(1, 30), key=st.text(max_size=4))
def test_a_mask_takes_so_many_different_places_in_order(width, dim, key):
    places = mask(width, dim, key).tolist()
    assert len(places) == min(width, dim) and places == sorted(set(places)) and set(places) <= set(range(width))


def test_a_mask_takes_every_place_alike():
    counts = torch.stack([mask(9, 4, str(seed)) for seed in range(2000)]).flatten().bincount(minlength=9)
    assert ((counts - 2000 * 4 / 9).abs() < 5 * (2000 * 4 / 9 * 5 / 9) ** 0.5).all()

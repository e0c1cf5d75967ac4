import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whence.linalg.project import kronecker_scales, projection


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

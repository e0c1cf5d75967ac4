import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whence.linalg.rotation import Rotation, split_sizes


def rotation(width: int, largest: int | None = None, seed: int = 0) -> Rotation:
    generator = torch.Generator().manual_seed(seed)
    sizes = split_sizes(width, largest)
    return Rotation(tuple(torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in sizes))


@given(width=st.integers(1, 40), largest=st.none() | st.integers(1, 12))
def test_block_sizes(width, largest):
    sizes = split_sizes(width, largest)
    assert sum(sizes) == width
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == 1 if largest is None else max(sizes) <= largest and len(sizes) == -(-width // largest)


@given(width=st.integers(1, 12), largest=st.none() | st.integers(1, 5), seed=st.integers(0, 2**31))
def test_rotating_is_multiplying_and_undone_by_unrotating(width, largest, seed):
    q = rotation(width, largest, seed)
    x = torch.randn(2, 3, width, dtype=torch.float64)
    assert q.width == width and q.dense().shape == (width, width)
    torch.testing.assert_close(q.rotate(x), x @ q.dense())
    torch.testing.assert_close(q.unrotate(x), x @ q.dense().T)
    torch.testing.assert_close(q.rotate_rows(x.mT), q.dense().T @ x.mT)
    torch.testing.assert_close(q.unrotate_rows(x.mT), q.dense() @ x.mT)
    torch.testing.assert_close(q.unrotate(q.rotate(x)), x)
    torch.testing.assert_close(q.rotate(x).norm(), x.norm())


@pytest.mark.parametrize("largest", [None, 2])
def test_other_formats(largest):
    q = rotation(5, largest).to(torch.empty(0, dtype=torch.float32))
    assert {block.dtype for block in q.blocks} == {torch.float32}

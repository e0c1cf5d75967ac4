import math

import pytest
import torch

from whence.fitting.curvature import Curvature
from whence.fitting.health import concentration, health
from whence.operators.eigen import BlockDiagonal, EigenBlock


def curvature(lam_OI):
    return Curvature(BlockDiagonal({"m": EigenBlock(None, None, lam_OI)}), {})


def test_numbers_of_a_known_spectrum():
    (found,) = health(curvature(torch.tensor([[4.0, 0.0], [0.0, 0.0]])), damping=0.5)
    assert found.module == "m" and found.shape == (2, 2) and found.sound
    assert (found.mean, found.largest, found.zero) == (1.0, 4.0, 0.75)
    assert found.condition == pytest.approx((4 + 0.5) / 0.5)
    assert found.effective_rank == pytest.approx(4 / 4.5)


@pytest.mark.parametrize(
    ("lam", "negative", "not_finite"),
    [([1.0, -1e-3], 1, 0), ([1.0, math.nan], 0, 1), ([1.0, math.inf], 0, 1), ([0.0, 0.0], 0, 0)],
)
def test_trouble_is_not_sound(lam, negative, not_finite):
    (found,) = health(curvature(torch.tensor([lam])))
    assert not found.sound and (found.negative, found.not_finite) == (negative, not_finite)


def test_concentration_counts_the_largest():
    assert concentration(torch.tensor([[1.0, 80.0], [15.0, 4.0]])) == {0.9: 2, 0.95: 2, 0.99: 3}
    assert concentration(torch.ones(2, 50), shares=(0.5,)) == {0.5: 50}

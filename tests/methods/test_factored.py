"""Factored inverses are those of the covariances of rows one by one, whatever the method and the damping."""

import pytest
from inverses import found, trained
from oracle import agree

from benchmarks.oracles.factored import ORACLES


@pytest.mark.parametrize("method", ["ekfac", "kfac", "shampoo", "diagonal"])
@pytest.mark.parametrize("damping", [{}, {"absolute_damping": 0.05}, {"damping": "training"}], ids=str)
def test_it_is_its_oracle(method, damping):
    agree(found(method, **damping).values, ORACLES[method](trained(), **damping), 1e-7)

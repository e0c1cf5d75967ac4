import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whence.linalg.lowrank import randomized_svd


def decaying(count, n_out, n_in, rate=0.5):
    """Matrices whose singular values fall by `rate`."""
    n = min(n_out, n_in)
    u = torch.linalg.qr(torch.randn(count, n_out, n, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(count, n_in, n, dtype=torch.float64)).Q
    return (u * rate ** torch.arange(n)) @ v.mT


@settings(deadline=None, max_examples=30)
@given(n_out=st.integers(1, 9), n_in=st.integers(1, 9), extra=st.integers(0, 3))
def test_full_rank_is_exact(n_out, n_in, extra):
    w = torch.randn(2, n_out, n_in, dtype=torch.float64)
    g, a, energy = randomized_svd(w, min(n_out, n_in) + extra)
    assert g.shape[1] == a.shape[1] == min(n_out, n_in)
    torch.testing.assert_close(g.mT @ a, w)
    torch.testing.assert_close(energy, torch.ones(2, dtype=torch.float64))


def test_low_rank_is_the_best_one_and_energy_is_what_it_keeps():
    w = decaying(3, 20, 30)
    g, a, energy = randomized_svd(w, 4)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    best = (u[..., :4] * s[:, None, :4]) @ vh[:, :4]
    torch.testing.assert_close(g.mT @ a, best, atol=1e-9, rtol=0)
    torch.testing.assert_close(energy, s[:, :4].square().sum(1) / s.square().sum(1))
    torch.testing.assert_close(g.norm(dim=2), a.norm(dim=2))
    torch.testing.assert_close(g.norm(dim=2).square(), s[:, :4])


def test_oversampling_finds_a_slow_decay():
    w = decaying(3, 60, 50, rate=0.9)
    _, _, energy = randomized_svd(w, 8)
    values = torch.linalg.svdvals(w).square()
    assert (energy > 0.99 * values[:, :8].sum(1) / values.sum(1)).all()


def test_the_seed_decides():
    w = decaying(2, 40, 40, rate=0.95)
    first, again, other = (randomized_svd(w, 3, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_zero_matrix_keeps_all_its_energy():
    g, a, energy = randomized_svd(torch.zeros(2, 5, 6), 2)
    assert not (g.mT @ a).any() and torch.equal(energy, torch.ones(2))

import pytest
import torch

from whence.errors import NumericalError
from whence.linalg.krylov import block_cg, cg, combine, inner

N = 60


def matrix(low=-3.0, size=N):
    """Eigenvalues from `10^low` to 1."""
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return q * torch.logspace(low, 0, size, dtype=torch.float64) @ q.T


def split(v_QP):
    """A block of two parts."""
    return {"matrix": v_QP[:, : N // 2].unflatten(1, (-1, 5)), "vector": v_QP[:, N // 2 :]}


def joined(block):
    return torch.cat([part.flatten(1) for part in block.values()], dim=1)


def times(a, counts=None):
    """The map; the numbers of vectors that it was given go to `counts`."""

    def apply(block):
        v_QP = joined(block)
        if counts is not None:
            counts.append(len(v_QP))
        return split(v_QP @ a)

    return apply


def error(solution, a, b_QP):
    return float((joined(solution.x) @ a - b_QP).norm(dim=1).div(b_QP.norm(dim=1).clamp(min=1e-300)).max())


@pytest.mark.parametrize("solve", [block_cg, cg])
def test_solves_what_the_dense_inverse_solves(solve):
    a, b_QP = matrix(), torch.randn(5, N, dtype=torch.float64)
    found = solve(times(a), split(b_QP), tolerance=1e-11, iterations=600)
    torch.testing.assert_close(joined(found.x), torch.linalg.solve(a, b_QP.T).T, rtol=1e-7, atol=1e-7)
    assert float(found.residual_Q.max()) <= 1e-11
    assert error(found, a, b_QP) == pytest.approx(float(found.residual_Q.max()), rel=1e-3)


def test_a_preconditioner_and_a_common_space_save_products():
    a, b_QP = matrix(), torch.randn(6, N, dtype=torch.float64)
    near = torch.linalg.inv(a + 1e-3 * matrix())
    plain, own, both = (
        solve(times(a), split(b_QP), precondition, tolerance=1e-8, iterations=600)
        for solve, precondition in ((cg, dict), (block_cg, dict), (block_cg, times(near)))
    )
    assert own.steps < plain.steps / 3
    assert both.steps < own.steps
    assert max(error(found, a, b_QP) for found in (plain, own, both)) <= 1.01e-8
    exact = block_cg(times(a), split(b_QP), times(torch.linalg.inv(a)), tolerance=1e-8)
    assert exact.steps == 1


def test_right_hand_sides_that_depend_on_each_other_leave_the_block():
    a, b_QP = matrix(-2), torch.randn(7, N, dtype=torch.float64)
    b_QP[1], b_QP[2], b_QP[3] = b_QP[0], -2 * b_QP[0] + b_QP[4], 0
    b_QP[5] = b_QP[4] + 1e-9 * torch.randn(N, dtype=torch.float64)
    b_QP[6] *= 1e-9
    counts = []
    found = block_cg(times(a, counts), split(b_QP), tolerance=1e-10)
    assert error(found, a, b_QP) <= 1e-10
    assert counts[0] in (3, 4) and not joined(found.x)[3].any()
    assert block_cg(times(a), split(0 * b_QP)).steps == 0


def test_right_hand_sides_leave_each_other_alone_in_cg():
    a, b_QP = matrix(), torch.randn(3, N, dtype=torch.float64)
    together = cg(times(a), split(b_QP), tolerance=1e-10, iterations=600)
    for q in range(3):
        alone = cg(times(a), split(b_QP[q : q + 1]), tolerance=1e-10, iterations=600)
        torch.testing.assert_close(joined(alone.x)[0], joined(together.x)[q], rtol=1e-6, atol=1e-6)
        block = block_cg(times(a), split(b_QP[q : q + 1]), tolerance=1e-10, iterations=600)
        assert torch.equal(joined(block.x), joined(alone.x)), "one right-hand side is a block of its own"


def test_a_saved_state_goes_on_to_the_same_bits():
    a, b_QP, states, residuals = matrix(), torch.randn(4, N, dtype=torch.float64), [], []

    def after(state, residual_Q):
        states.append({name: tensor.clone() for name, tensor in state.items()})
        residuals.append(float(residual_Q.max()))

    whole = block_cg(times(a), split(b_QP), tolerance=1e-9, after=after)
    assert len(states) == whole.steps - 1 and residuals[-1] < residuals[0]
    for state in states[:: len(states) // 2]:
        resumed = block_cg(times(a), split(b_QP), tolerance=1e-9, state=state)
        assert torch.equal(joined(resumed.x), joined(whole.x)) and resumed.steps == whole.steps


def test_rounding_is_told_from_failure():
    a, b_QP = matrix(-1).float(), torch.randn(3, N)
    found = block_cg(times(a), split(b_QP), tolerance=1e-12)
    assert 1e-12 < float(found.residual_Q.max()) < 1e-5
    with pytest.raises(NumericalError, match="after 3 steps of at most 3"):
        block_cg(times(a), split(b_QP), tolerance=1e-6, iterations=3)
    with pytest.raises(NumericalError, match="upwards"):
        block_cg(times(a - 0.5 * torch.eye(N)), split(b_QP))
    with pytest.raises(NumericalError, match="not finite"):
        block_cg(times(a), split(b_QP * torch.inf))
    noisy = lambda block: {name: part * (1 + torch.rand(())) for name, part in times(a)(block).items()}  # noqa: E731
    with pytest.raises(NumericalError, match="did not come down"):
        block_cg(noisy, split(b_QP), tolerance=1e-6)


def test_inner_products_and_combinations_are_those_of_the_flat_vectors():
    a_QP, b_QP, mix = torch.randn(3, N), torch.randn(2, N), torch.randn(4, 3)
    torch.testing.assert_close(inner(split(a_QP), split(b_QP)), (a_QP @ b_QP.T).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(joined(combine(mix, split(a_QP))), mix @ a_QP)

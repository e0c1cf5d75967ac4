"""Steps along sampled residuals, against the same in dense matrices and against what they come to."""

import pytest
import torch
from oracle import agree

from whence.errors import NumericalError
from whence.linalg.richardson import richardson

SIZE, COUNT = 12, 3


def problem(seed=0, noise=0.0):
    """Matrices of some steps, their mean, right-hand sides, and a preconditioner."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    half = draw(SIZE, SIZE) / SIZE**0.5
    mean = half @ half.T + 0.2 * torch.eye(SIZE)
    samples = [mean + noise * (part @ part.T / SIZE - torch.eye(SIZE)) for part in (draw(SIZE, SIZE) for _ in range(64))]
    near = torch.linalg.inv(mean.diag().diag())
    return mean, samples, draw(COUNT, SIZE), near


def parts(x):
    return {"a": x[:, :5], "b": x[:, 5:].reshape(len(x), 7, 1)}


def whole(x):
    return torch.cat([x["a"], x["b"].flatten(1)], 1)


def as_map(matrix):
    return lambda x: parts(whole(x) @ matrix)


def run(matrices, b, near=None, **how):
    sampled = lambda step, x: as_map(matrices[step % len(matrices)])(x)  # noqa: E731
    how = {"start": parts(torch.zeros_like(b)), "scale": 4.0, **how}
    return richardson(sampled, parts(b), *([as_map(near)] if near is not None else []), **how)


def test_the_steps_are_those_of_the_formula():
    _, samples, b, near = problem(noise=0.1)
    x = mean = torch.zeros_like(b)
    for step in range(10):
        x = x + (b - x @ samples[step]) @ near / 4
        mean = mean + (x - mean) * min(1, 4 / (step + 4))
    agree(whole(run(samples, b, near, steps=10).x), x, 1e-12)
    agree(whole(run(samples, b, near, steps=10, weight=3).x), mean, 1e-12)
    iterates = [whole(run(samples, b, steps=count).x) for count in range(1, 11)]
    agree(whole(run(samples, b, steps=10, weight=0).x), sum(iterates) / 10, 1e-12)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_they_come_to_the_inverse_and_stop_there(preconditioned):
    mean, _, b, near = problem()
    found = run([mean], b, near if preconditioned else None, steps=3000, tolerance=1e-9)
    agree(whole(found.x), torch.linalg.solve(mean, b.T).T, 1e-7)
    assert found.steps < 3000


def test_means_of_iterates_and_of_repeats_take_noise_away():
    mean, samples, b, _ = problem(noise=0.3)
    exact = torch.linalg.solve(mean + 0.3 * (sum(samples) / 64 - mean) / 0.3, b.T).T
    error = lambda **how: float((whole(run(samples, b, **how).x) - exact).norm() / exact.norm())  # noqa: E731
    assert error(steps=448, weight=3) < 0.5 * error(steps=448)
    assert error(steps=116, repeats=8) < 0.7 * error(steps=116)


def test_a_killed_search_resumes_to_the_same_bits():
    _, samples, b, near = problem(noise=0.1)
    states = []
    how = {"steps": 7, "repeats": 3, "weight": 1.0, "window": 4}
    expected = run(samples, b, near, **how, after=lambda state, residual_Q: states.append(state))
    assert [int(state["steps"]) for state in states] == list(range(1, 22))
    for state in states[::4] + states[-1:]:
        again = run(samples, b, near, **how, state=state)
        assert again.steps == 21 and torch.equal(whole(again.x), whole(expected.x))


def test_the_residual_that_is_watched_is_that_of_the_mean_over_the_last_pass():
    _, samples, b, _ = problem(noise=0.1)
    seen, states = [], []
    after = lambda state, residual_Q: (seen.append(residual_Q), states.append(state))  # noqa: E731
    run(samples, b, steps=320, scale=40.0, window=64, after=after)
    weights = (63 / 64) ** torch.arange(319, -1, -1.0).double()
    mean = sum(
        weight * whole({name: state[f"x/{name}"] for name in "ab"})
        for weight, state in zip(weights[1:], states[:-1], strict=True)
    )
    left = b - mean / weights[1:].sum() @ (sum(samples) / 64)
    assert torch.allclose(seen[-1], left.norm(dim=1) / b.norm(dim=1), rtol=0.2) and (seen[0] == 1).all()
    assert (seen[-1] < 0.2).all()


def test_steps_that_are_too_long_raise():
    mean, _, b, _ = problem()
    half = float(torch.linalg.eigvalsh(mean).max()) / 2
    run([mean], b, steps=300, scale=1.02 * half)
    with pytest.raises(NumericalError, match="diverge(?s:.*)use a scale of 7"):
        run([mean], b, steps=3000, scale=0.9 * half, advice=lambda: "use a scale of 7")
    with pytest.raises(NumericalError, match="diverge"):
        run([mean * torch.nan], b, steps=2)

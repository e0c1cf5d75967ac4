"""Methods that unlearn, step by step on one vector of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from benchmarks.oracles.base import Case

Falling = Callable[[Tensor], Tensor]


def untrac(
    case: Case, groups: str = "auto", epochs: int = 1, batch_size: int = 1, learning_rate: float = 5e-5, seed: int = 0
) -> np.ndarray:
    """`L(q; theta_T) - L(q; theta_0)` after gradient ascent on a group's loss (Isonuma and Titov 2024, section 3.1), by row."""
    problem, raw = case.problem, torch.zeros(len(case.queries), len(case.rows)).double()
    sources = [row.get("source") for row in case.rows]
    names = list(range(len(case.rows))) if groups == "rows" or len(set(sources)) == 1 else sources
    for name in dict.fromkeys(names):
        rows = [row for row, own in enumerate(names) if own == name]
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(rows), generator=generator).split(batch_size) for _ in range(epochs)]
        steps = [_likelihood(case, [rows[place] for place in batch]) for order in orders for batch in order]
        lost_Q = problem.measured() - problem.measured(_adam(problem.theta, steps, learning_rate))
        raw[:, rows] = lost_Q[:, None] / len(rows)
    return raw.numpy()


def untrac_inv(case: Case, steps: int = 5, learning_rate: float = 5e-5) -> np.ndarray:
    """`L(z; theta_T) - L(z; theta_0)` after gradient ascent on the query's loss (Isonuma and Titov 2024, section 3.2)."""
    problem, every = case.problem, range(len(case.rows))

    def losses(theta: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([problem.at(theta, problem.task.losses, problem.row(row)) for row in every])

    found = []
    for query in problem.asked:
        falling = [lambda theta, query=query: problem._measure(theta, query)] * steps
        found.append(losses(_adam(problem.theta, falling, learning_rate)) - losses(problem.theta))
    return torch.stack(found).numpy()


def _likelihood(case: Case, rows: list[int]) -> Falling:
    problem = case.problem
    return lambda theta: -torch.cat([problem.at(theta, problem.task.losses, problem.row(row)) for row in rows]).mean()


def _adam(theta: Tensor, steps: Iterable[Falling], rate: float, b1: float = 0.9, b2: float = 0.999) -> Tensor:
    """Algorithm 1 of Kingma and Ba 2015."""
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, falling in enumerate(steps, 1):
        at = theta.detach().requires_grad_()
        (g,) = torch.autograd.grad(falling(at), at)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        theta = theta - rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + 1e-8)
    return theta


ORACLES = {"untrac": untrac, "untrac-inv": untrac_inv}

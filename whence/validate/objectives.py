"""The objectives that a row's loss is added to, and their minima near the trained weights (Bae et al. 2022).

`e` is how much of a row's loss is added: `1/N` is one more copy, `-1/N` takes the row out. `E` sizes of the change, in units of
1/N; `Q` queries, `P` weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.tasks.base import Batch
from whence.validate.exact import Inverse
from whence.validate.minimise import Minimum, minimise
from whence.validate.problem import Function, Outputs, Problem

EPSILONS = (1.0, 0.1, 0.01)
TOLERANCE, STEPS = 1e-6, 200
"""Norm of the gradient at a minimum, in units of the row's own `e |grad L(z)|`; steps after which it counts as not found."""

LOOSE, LARGE_STEPS = 1e-3, 80
"""The same for changes of a whole copy, whose objective may have no minimum near the trained weights."""

SHARES = (1.0, 0.3, 0.1, 0.0)
"""Fractions of the linear prediction that are tried as a start there."""


class Objectives:
    """The objectives that a row is added to, with its minima found from the trained weights."""

    def __init__(self, problem: Problem, inverse: Inverse, weight_decay: float = 0.0):
        self.problem, self.inverse, self.absolute, self.weight_decay = problem, inverse, inverse.absolute, weight_decay
        with torch.no_grad():
            self.anchors: list[Outputs] = [problem.outputs(problem.theta, batch) for batch in problem.batches]

    def solved_with(self, inverse: Inverse) -> Objectives:
        """The same objectives, whose minima are searched with a different inverse curvature."""
        other = copy.copy(self)
        other.inverse = inverse
        return other

    def bregman(self, row: int | None, epsilon: float) -> Function:
        """The proximal Bregman objective."""
        outputs, anchors = self.problem.outputs, self.anchors
        return self._with_row(lambda n, batch, at: outputs(at, batch).divergence(anchors[n]).sum(), row, epsilon, 0.0)

    def proximal(self, row: int | None, epsilon: float) -> Function:
        """Training loss (with the weight decay) instead of the divergence, proximity as there."""
        at, losses = self.problem.at, self.problem.task.losses
        return self._with_row(lambda _, batch, theta: at(theta, losses, batch).sum(), row, epsilon, self.weight_decay)

    def solve(self, function: Function, start: Tensor, tolerance: float, steps: int = STEPS) -> Minimum:
        """The minimum near `start`."""
        return minimise(function, start, lambda v: self.inverse(v[None])[0], tolerance, steps=steps)

    def _with_row(
        self, terms: Callable[[int, Batch, Tensor], Tensor], row: int | None, epsilon: float, weight_decay: float
    ) -> Function:
        problem = self.problem
        own = None if row is None else problem.row(row)

        def function(theta: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = problem.sum_of(theta, terms)
            value, gradient = value / len(problem.rows), gradient / len(problem.rows)
            if own is not None:
                at = theta.detach().requires_grad_()
                loss = problem.at(at, problem.task.losses, own).sum()
                gradient += epsilon * torch.autograd.grad(loss, at)[0]
                value += epsilon * loss.detach()
            moved = theta - problem.theta
            value += self.absolute / 2 * moved @ moved + weight_decay / 2 * theta @ theta
            return value, gradient + self.absolute * moved + weight_decay * theta

        return function


@dataclass(frozen=True)
class Minima:
    """The minima with one row added and taken out: measurements `[E, Q]` at both, residuals and steps `[E]`."""

    plus_EQ: Tensor
    minus_EQ: Tensor
    residual_E: Tensor
    steps_E: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """For a shard."""
        return {name: getattr(self, name) for name in ("plus_EQ", "minus_EQ", "residual_E", "steps_E")}

    def padded(self, sizes: int) -> Minima:
        """The same with NaN for the larger changes that the row was not tried at."""
        missing = sizes - len(self.residual_E)
        return Minima(
            *(torch.cat([own.new_full((missing, *own.shape[1:]), torch.nan), own]) for own in self.tensors().values())
        )


def solve_row(
    objectives: Objectives,
    row: int,
    epsilons: Sequence[float] = EPSILONS,
    tolerance: float = TOLERANCE,
    newton: Tensor | None = None,
) -> Minima:
    """Minimise the proximal Bregman objective with the row added `epsilon / N` times and taken out as often.

    `newton [P]` is the damped inverse curvature times the row's gradient, where it is known already.
    """
    problem = objectives.problem
    gradient = problem.row_gradient(row)
    size, newton = float(gradient.norm()), objectives.inverse(gradient[None])[0] if newton is None else newton
    measured, residuals, steps = {1: [], -1: []}, [], []
    for part in epsilons:
        found = []
        for sign in (1, -1):
            epsilon = sign * part / len(problem.rows)
            function, goal = objectives.bregman(row, epsilon), abs(epsilon) * max(size, 1e-300)
            starts = [problem.theta - share * epsilon * newton for share in (SHARES if part >= 1 else SHARES[:1])]
            start = min(starts, key=lambda at: float(function(at)[0]))
            limits = (LOOSE, LARGE_STEPS) if part >= 1 else (tolerance, STEPS)
            minimum = objectives.solve(function, start, limits[0] * goal, limits[1])
            measured[sign].append(problem.measured(minimum.theta))
            found.append((minimum.residual / goal, float(minimum.steps)))
        residuals.append(max(residual for residual, _ in found))
        steps.append(max(taken for _, taken in found))
    return Minima(torch.stack(measured[1]), torch.stack(measured[-1]), torch.tensor(residuals), torch.tensor(steps))

"""Minimise a smooth function of one vector by L-BFGS that begins with a given inverse curvature."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from whence.validate.problem import Function

HALVINGS = 30
CURVATURE = 0.5
"""Share of the first slope along a line at which a point on it is good enough (Nocedal & Wright 2006, eq. 3.7b)."""
Pairs = deque[tuple[Tensor, Tensor, float]]
"""The last steps `s`, the changes of the gradient `y`, and `s^T y`."""

SLACK = 1e-11
"""How much of its size a value may rise: sums come out no better than that."""


@dataclass(frozen=True)
class Minimum:
    """Where the search ended: `residual` is the gradient's norm there, `steps` how many it took."""

    theta: Tensor
    residual: float
    steps: int
    converged: bool


def minimise(
    function: Function,
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    tolerance: float,
    *,
    steps: int = 200,
    memory: int = 40,
) -> Minimum:
    """Minimise until the gradient's norm is `tolerance` or less, or `steps` are taken, or no step goes down any more.

    Near the minimum differences of values drown in rounding, so steps are judged by the slope along the line, which has
    to shrink; values must not rise.
    """
    theta = start.clone()
    value, gradient = function(theta)
    pairs: Pairs = deque(maxlen=memory)
    for step in range(steps):
        residual = float(gradient.norm())
        if residual <= tolerance:
            return Minimum(theta, residual, step, True)
        direction = -_two_loops(gradient, pairs, precondition)
        found = _line_search(function, theta, value, gradient, direction)
        if found is None and not pairs:
            return Minimum(theta, residual, step, False)
        if found is None:
            pairs.clear()
            continue
        moved, value, after = found
        s, y = moved - theta, after - gradient
        if (product := float(s @ y)) > 1e-14 * float(s.norm() * y.norm()):
            pairs.append((s, y, product))
        theta, gradient = moved, after
    residual = float(gradient.norm())
    return Minimum(theta, residual, steps, residual <= tolerance)


def _two_loops(gradient: Tensor, pairs: Pairs, precondition: Callable[[Tensor], Tensor]) -> Tensor:
    """The inverse Hessian that the last steps suggest, times the gradient (Nocedal & Wright 2006, algorithm 7.4)."""
    q, shares = gradient.clone(), []
    for s, y, product in reversed(pairs):
        shares.append(float(s @ q) / product)
        q -= shares[-1] * y
    q = precondition(q)
    for (s, y, product), share in zip(pairs, reversed(shares), strict=True):
        q += (share - float(y @ q) / product) * s
    return q


def _line_search(
    function: Function, theta: Tensor, value: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A point along the direction where the slope has shrunk and the value is no higher; None where there is none."""
    slope = float(gradient @ direction)
    if not slope < 0:
        return None
    low, high, length, slopes = 0.0, math.inf, 1.0, (slope, math.inf)
    for _ in range(HALVINGS):
        moved = theta + length * direction
        reached, after = function(moved)
        along = float(after @ direction)
        allowed = float(value) + SLACK * abs(float(value)) + 1e-18
        if not float(reached) <= allowed or along > -CURVATURE * slope:
            high, slopes = length, (slopes[0], along)  # too far
        elif along < CURVATURE * slope:
            low, slopes = length, (along, slopes[1])  # not far enough
        else:
            return moved, reached, after
        # on to where a linear slope would be zero, a tenth or more from either end; to the middle where slopes say nothing
        sensible = math.isfinite(slopes[1]) and slopes[1] > 0
        share = min(max(slopes[0] / (slopes[0] - slopes[1]), 0.1), 0.9) if sensible else 0.5
        length = low + (high - low) * share if math.isfinite(high) else 2 * length
    return None

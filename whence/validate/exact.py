"""Influence with the exact damped Gauss-Newton matrix of a small model, in float64: what approximations are measured against.

Three ways to the same numbers. "dense" forms the matrix `G [P, P]`; "dual" uses the rows `j` of which it is the mean square,
`(G + l)^-1 v = (v - j^T (N l + j j^T)^-1 j v) / l`, with a matrix of as many rows as the loss depends on numbers; "cg" solves
with conjugate gradients and products that never form anything. All weights interact: no blocks, no Kronecker factors.

`P` weights, `N` training rows, `M` numbers that the loss depends on (rows times classes or outputs).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from whence.errors import UsageError
from whence.linalg.krylov import block_cg
from whence.progress import stage
from whence.validate.problem import Problem

Way = Literal["auto", "dense", "dual", "cg"]

LARGEST = 6000
"""Side of a matrix that is formed and decomposed."""
LARGEST_ROWS = 2**28
"""Numbers of the dual form's rows, 2 GiB."""
PROBES, TOGETHER = 64, 8
"""Random vectors that the trace is estimated with where nothing is formed, and how many of them are multiplied at a time."""

Solve = Callable[[Tensor], Tensor]
"""From vectors `[K, P]` to the solutions."""
Form = tuple[Callable[[], float], Callable[[float], Solve]]
"""The trace of the curvature, and what solves with it for an absolute damping."""


@dataclass(frozen=True)
class Damping:
    """`absolute`, or `relative` times the mean eigenvalue of the curvature."""

    absolute: float
    relative: float
    mean: float
    """Mean eigenvalue, trace / P."""


@dataclass(frozen=True)
class Inverse:
    """`(G + absolute)^-1` as a map of vectors `[K, P]`."""

    problem: Problem
    absolute: float
    solve: Solve

    def __call__(self, v_KP: Tensor) -> Tensor:
        """Apply it to each row."""
        return self.solve(v_KP)

    def residual(self, v_KP: Tensor, u_KP: Tensor) -> float:
        """The largest `|(G + absolute) u - v| / |v|`, by products that never form the matrix."""
        left = self.problem.gauss_newton(u_KP) + self.absolute * u_KP - v_KP
        return float((left.norm(dim=1) / v_KP.norm(dim=1).clamp(min=torch.finfo(v_KP.dtype).tiny)).max())


class GaussNewton:
    """The Gauss-Newton matrix of the mean training loss at a model's weights, in the form `kind`."""

    def __init__(self, problem: Problem, kind: Way):
        self.problem = problem
        self.kind: Way = kind
        self._trace, self._solver = {"dense": dense, "dual": dual, "cg": iterative}[kind](problem)

    @functools.cached_property
    def trace(self) -> float:
        """Sum of the eigenvalues."""
        return self._trace()

    def damping(self, relative: float, absolute: float | None = None) -> Damping:
        """`relative` times the mean eigenvalue as a number, unless an absolute one is given."""
        mean = self.trace / self.problem.size
        chosen = relative * mean if absolute is None else absolute
        if not chosen > 0:
            raise UsageError("The damping must be above zero", given=f"{chosen:g}", fix="damping=0.1, or absolute=1e-3")
        return Damping(chosen, chosen / mean, mean)

    def inverse(self, absolute: float) -> Inverse:
        """`(G + absolute)^-1`."""
        return Inverse(self.problem, absolute, self._solver(absolute))


def gauss_newton(problem: Problem, way: Way = "auto") -> GaussNewton:
    """The curvature, by the cheapest way that fits: "dense" for few weights, "dual" for few rows, else "cg"."""
    if way == "auto":
        rows = problem.dual_size
        fits = rows <= LARGEST and rows * problem.size <= LARGEST_ROWS
        formed = "dense" if problem.size <= LARGEST else "dual" if fits else "cg"
        way = "dual" if fits and rows <= problem.size else formed
    if way not in ("dense", "dual", "cg"):
        raise UsageError(f"There is no way {way!r} to the exact curvature", accepted="auto, dense, dual, cg")
    return GaussNewton(problem, way)


def dense(problem: Problem) -> Form:
    """The matrix itself, `[P, P]`."""
    matrix = torch.zeros(problem.size, problem.size).to(problem.theta)
    for part in _blocks(problem, "Gauss-Newton"):
        matrix.addmm_(part.T, part, alpha=1 / len(problem.rows))

    def solver(absolute: float) -> Solve:
        factor = torch.linalg.cholesky(matrix + absolute * torch.eye(len(matrix)).to(matrix))
        return lambda v_KP: torch.cholesky_solve(v_KP.T, factor).T

    return lambda: float(matrix.trace()), solver


def dual(problem: Problem) -> Form:
    """The rows `j [M, P]` whose mean square it is, and their products with each other."""
    j_MP = torch.cat(list(_blocks(problem, "Jacobian")))
    gram = j_MP @ j_MP.T

    def solver(absolute: float) -> Solve:
        factor = torch.linalg.cholesky(gram + len(problem.rows) * absolute * torch.eye(len(gram)).to(gram))
        return lambda v_KP: (v_KP - torch.cholesky_solve(j_MP @ v_KP.T, factor).T @ j_MP) / absolute

    return lambda: float(gram.trace()) / len(problem.rows), solver


def iterative(problem: Problem, tolerance: float = 1e-8, iterations: int = 5000) -> Form:
    """Products only; the trace is an estimate (Hutchinson 1990) with `PROBES` seeded vectors of signs."""

    def trace() -> float:
        draw, found = torch.Generator().manual_seed(0), []
        signs = torch.randint(0, 2, (PROBES, problem.size), generator=draw).to(problem.theta) * 2 - 1
        with stage("trace", PROBES, "products") as advance:
            for part in signs.split(TOGETHER):
                found += (part * problem.gauss_newton(part)).sum(1).tolist()
                advance(len(part))
        return float(np.mean(found))

    def solver(absolute: float) -> Solve:
        def damped(v: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"theta": problem.gauss_newton(v["theta"]) + absolute * v["theta"]}

        return lambda v_KP: block_cg(damped, {"theta": v_KP}, tolerance=tolerance, iterations=iterations).x["theta"]

    return trace, solver


def influence(problem: Problem, inverse: Inverse, rows: Sequence[int] | None = None) -> tuple[np.ndarray, float]:
    """Raw scores `[Q, rows]` (default: all training rows; 0 where a row has no loss), and the residual of the solutions."""
    v_QP = problem.query_gradients()
    u_QP = inverse(v_QP)
    residual = inverse.residual(v_QP, u_QP)
    wanted, usable = range(len(problem.train)) if rows is None else rows, set(problem.rows)
    raw = np.zeros((len(v_QP), len(wanted)))
    with stage("exact scores", len(wanted), "rows") as advance:
        for column, row in enumerate(wanted):
            if row in usable:
                raw[:, column] = -(u_QP @ problem.row_gradient(row)).numpy(force=True)
            advance(1)
    return raw, residual


def _blocks(problem: Problem, name: str) -> Any:
    """The rows of the Jacobian, of some hundred numbers at a time."""
    waiting: list[Tensor] = []
    with stage(name, len(problem.rows), "rows") as advance:
        for rows in problem.jacobian_rows():
            waiting.append(rows)
            if sum(map(len, waiting)) >= 512:
                yield torch.cat(waiting)
                waiting = []
            advance(1)
    if waiting:
        yield torch.cat(waiting)

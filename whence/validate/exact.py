"""Influence with the exact damped Gauss-Newton matrix of a small model, in float64: what approximations are measured against.

Three ways to the same numbers. "dense" forms the matrix `G [P, P]`; "dual" uses the rows `j` of which it is the mean square,
`(G + l)^-1 v = (v - j^T (N l + j j^T)^-1 j v) / l`, with a matrix of as many rows as the loss depends on numbers; "cg" solves
with conjugate gradients and products that never form anything. All weights interact: no blocks, no Kronecker factors.

`P` weights, `N` training rows, `M` numbers that the loss depends on (rows times classes or outputs).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from whence.data.rows import Rows
from whence.engine.stream import read
from whence.errors import NumericalError, UsageError
from whence.progress import stage
from whence.store.scores import Scores, describe_queries, describe_rows
from whence.tasks.base import Task
from whence.validate.problem import Problem

Way = Literal["auto", "dense", "dual", "cg"]

LARGEST = 6000
"""Side of a matrix that is formed and decomposed."""
LARGEST_ROWS = 2**28
"""Numbers of the dual form's rows, 2 GiB."""
PROBES = 64
"""Random vectors that the trace is estimated with where nothing is formed."""


@dataclass(frozen=True)
class Damping:
    """`absolute`, or `relative` times the mean eigenvalue of the curvature."""

    absolute: float
    relative: float
    mean: float
    """Mean eigenvalue, trace / P."""


class GaussNewton(abc.ABC):
    """The Gauss-Newton matrix of the mean training loss at a model's weights."""

    kind: Way

    def __init__(self, problem: Problem):
        self.problem = problem

    @property
    @abc.abstractmethod
    def trace(self) -> float:
        """Sum of the eigenvalues."""

    @abc.abstractmethod
    def inverse(self, absolute: float) -> Inverse:
        """`(G + absolute)^-1`."""

    def damping(self, relative: float, absolute: float | None = None) -> Damping:
        """`relative` times the mean eigenvalue as a number, unless an absolute one is given."""
        mean = self.trace / self.problem.size
        chosen = relative * mean if absolute is None else absolute
        if not chosen > 0:
            raise UsageError("The damping must be above zero", given=f"{chosen:g}", fix="damping=0.1, or absolute=1e-3")
        return Damping(chosen, chosen / mean, mean)


class Inverse(abc.ABC):
    """`(G + absolute)^-1` as a map of vectors."""

    def __init__(self, problem: Problem, absolute: float):
        self.problem, self.absolute = problem, absolute

    @abc.abstractmethod
    def __call__(self, v_KP: Tensor) -> Tensor:
        """Apply it to each row."""

    def residual(self, v_KP: Tensor, u_KP: Tensor) -> float:
        """The largest `|(G + absolute) u - v| / |v|`, by products that never form the matrix."""
        worst = 0.0
        for v, u in zip(v_KP, u_KP, strict=True):
            left = self.problem.gauss_newton(u) + self.absolute * u - v
            worst = max(worst, float(left.norm() / v.norm().clamp(min=torch.finfo(v.dtype).tiny)))
        return worst


class Dense(GaussNewton):
    """The matrix itself, `[P, P]`."""

    kind: Way = "dense"

    def __init__(self, problem: Problem):
        super().__init__(problem)
        size = problem.size
        self.matrix = torch.zeros(size, size).to(problem.theta)
        for part in _blocks(problem, "Gauss-Newton"):
            self.matrix.addmm_(part.T, part, alpha=1 / len(problem.rows))

    @property
    def trace(self) -> float:
        return float(self.matrix.trace())

    def inverse(self, absolute: float) -> Inverse:
        return _DenseInverse(self, absolute)


class _DenseInverse(Inverse):
    def __init__(self, curvature: Dense, absolute: float):
        super().__init__(curvature.problem, absolute)
        damped = curvature.matrix.clone()
        damped.diagonal().add_(absolute)
        self.factor = torch.linalg.cholesky(damped)

    def __call__(self, v_KP: Tensor) -> Tensor:
        return torch.cholesky_solve(v_KP.T, self.factor).T


class Dual(GaussNewton):
    """The rows `j [M, P]` whose mean square it is, and their products with each other."""

    kind: Way = "dual"

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.j_MP = torch.cat(list(_blocks(problem, "Jacobian")))
        self.gram = self.j_MP @ self.j_MP.T

    @property
    def trace(self) -> float:
        return float(self.gram.trace()) / len(self.problem.rows)

    def inverse(self, absolute: float) -> Inverse:
        return _DualInverse(self, absolute)


class _DualInverse(Inverse):
    def __init__(self, curvature: Dual, absolute: float):
        super().__init__(curvature.problem, absolute)
        self.j_MP = curvature.j_MP
        damped = curvature.gram.clone()
        damped.diagonal().add_(len(curvature.problem.rows) * absolute)
        self.factor = torch.linalg.cholesky(damped)

    def __call__(self, v_KP: Tensor) -> Tensor:
        inner = torch.cholesky_solve(self.j_MP @ v_KP.T, self.factor)
        return (v_KP - inner.T @ self.j_MP) / self.absolute


class Iterative(GaussNewton):
    """Products only; the trace is an estimate (Hutchinson 1990) with `PROBES` seeded vectors of signs."""

    kind: Way = "cg"

    def __init__(self, problem: Problem, tolerance: float = 1e-8, iterations: int = 5000):
        super().__init__(problem)
        self.tolerance, self.iterations = tolerance, iterations
        self._trace: float | None = None

    @property
    def trace(self) -> float:
        if self._trace is None:
            draw = torch.Generator().manual_seed(0)
            signs = torch.randint(0, 2, (PROBES, self.problem.size), generator=draw).to(self.problem.theta) * 2 - 1
            found = []
            with stage("trace", PROBES, "products") as advance:
                for sign in signs:
                    found.append(float(sign @ self.problem.gauss_newton(sign)))
                    advance(1)
            self._trace = float(np.mean(found))
        return self._trace

    def inverse(self, absolute: float) -> Inverse:
        return _IterativeInverse(self, absolute)


class _IterativeInverse(Inverse):
    def __init__(self, curvature: Iterative, absolute: float):
        super().__init__(curvature.problem, absolute)
        self.tolerance, self.iterations = curvature.tolerance, curvature.iterations

    def __call__(self, v_KP: Tensor) -> Tensor:
        return torch.stack([self._solve(v) for v in v_KP])

    def _solve(self, v: Tensor) -> Tensor:
        """Conjugate gradients (Hestenes & Stiefel 1952) from zero until the residual is `tolerance` of `|v|`."""
        u, r = torch.zeros_like(v), v.clone()
        p, square, goal = r.clone(), float(r @ r), self.tolerance**2 * float(v @ v)
        for _ in range(self.iterations):
            if square <= goal:
                return u
            applied = self.problem.gauss_newton(p) + self.absolute * p
            step = square / float(p @ applied)
            u, r = u + step * p, r - step * applied
            square, before = float(r @ r), square
            p = r + square / before * p
        raise NumericalError(
            f"Conjugate gradients did not come down to a residual of {self.tolerance:g}",
            given=f"{(square / float(v @ v)) ** 0.5:.1e} after {self.iterations} products, damping {self.absolute:g}",
            fix="use a larger damping",
        )


def gauss_newton(problem: Problem, way: Way = "auto") -> GaussNewton:
    """The curvature, by the cheapest way that fits: "dense" for few weights, "dual" for few rows, else "cg"."""
    if way == "auto":
        rows = problem.dual_size
        fits = rows <= LARGEST and rows * problem.size <= LARGEST_ROWS
        formed = "dense" if problem.size <= LARGEST else "dual" if fits else "cg"
        way = "dual" if fits and rows <= problem.size else formed
    known = {"dense": Dense, "dual": Dual, "cg": Iterative}
    if way not in known:
        raise UsageError(f"There is no way {way!r} to the exact curvature", accepted="auto, " + ", ".join(known))
    return known[way](problem)


def exact_scores(
    model: nn.Module,
    task: Task,
    queries: Any,
    train: Any,
    *,
    damping: float = 0.1,
    absolute: float | None = None,
    modules: str | Sequence[str] | None = "all",
    way: Way = "auto",
) -> Scores:
    """Scores with the exact damped Gauss-Newton matrix of all tracked weights together, as `whence.score` gives them.

    Damping is `damping` times the mean eigenvalue of the whole matrix (not module by module), or `absolute`. `about`
    says the damping, the way and the residual of the solutions.
    """
    problem = Problem(model, task, train, queries, modules)
    curvature = gauss_newton(problem, way)
    chosen = curvature.damping(damping, absolute)
    raw, residual = influence(problem, curvature.inverse(chosen.absolute))
    about = {
        "operator": f"exact Gauss-Newton, inverse with damping {chosen.absolute:g} = {chosen.relative:g} x mean eigenvalue",
        "way": curvature.kind,
        "damping": chosen.absolute,
        "mean_eigenvalue": chosen.mean,
        "residual": residual,
    }
    return as_scores(problem, queries, raw, about)


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


def as_scores(problem: Problem, queries: Any, raw: np.ndarray, about: dict[str, Any]) -> Scores:
    """The matrix with ids and texts of both sides."""
    import pandas

    rows, train = problem.train.rows, problem.train
    asked = describe_queries(read(queries), problem.task, problem.weighted)
    measurement = problem.task.settings().get("measurement", "logprob")
    unit = "nats per copy" if measurement in ("logprob", "loss") else f"{measurement} per copy"
    return Scores(
        raw=raw,
        n_train=len(problem.rows),
        examples=describe_rows(rows, train.ids, train.sizes, rows.copies if isinstance(rows, Rows) else None),
        queries=pandas.DataFrame({**asked, "measured": problem.measured().numpy(force=True)}),
        about={"unit": unit, "measurement": measurement, **about},
    )


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

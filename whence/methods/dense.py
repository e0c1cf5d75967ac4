"""The inverse of a damped curvature matrix that is formed, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from whence.engine.matrices import Matrix
from whence.engine.search import searching
from whence.errors import NumericalError, UsageError
from whence.gradients import Gradients
from whence.methods.damping import Damping
from whence.operators import Operator
from whence.operators.flat import Flat
from whence.progress import note
from whence.store.fingerprint import fingerprint_operator

COLUMNS = 64
"""Of the matrix that a pass over the rows gives."""

LARGEST = 10_000
"""Weights of the tracked modules at most: the matrix and its factor take 1.6 GB then."""


class DenseInverse(Operator):
    """`(matrix + damping)^-1`, formed column by column and inverted in float64; `saving` is where it is kept meanwhile."""

    def __init__(self, matrix: Matrix, damping: Damping, **saving: Any):
        self.matrix, self.damping, self.saving = matrix, damping, saving
        self.names, self.label = matrix.names, f"{matrix.label}, inverse with {damping.label}"

    def identity(self) -> Any:
        """Which matrix, and how it is damped."""
        return {"inverse": self.matrix.identity(), **self.damping.identity()}

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Solve for all gradients."""
        flat = Flat.of(gradients, self.names)
        b_QP = flat.vectors(gradients)
        return flat.gradients(self.solver(flat, b_QP)(b_QP.double().T).T.to(b_QP))

    def solver(self, flat: Flat, like: Tensor) -> Callable[[Tensor], Tensor]:
        """From right-hand sides `[P, Q]` to solutions: with Cholesky's factor, or LU where it is not positive definite."""

        def made_from() -> dict[str, Any]:
            return {"stage": "solve", **fingerprint_operator(self)}

        damped_PP = formed(self.matrix, flat, like, made_from, **self.saving)
        damping = self.damping.at(lambda: mean_eigenvalue(damped_PP)).operator
        damped_PP.diagonal().add_(flat.vectors(damping @ flat.gradients(like.new_ones(1, flat.size)))[0])
        factor, bad = torch.linalg.cholesky_ex(damped_PP)
        if not bad:
            return lambda b_PQ: torch.cholesky_solve(b_PQ, factor)
        factor, pivots, bad = torch.linalg.lu_factor_ex(damped_PP)
        if bad or not torch.isfinite(factor).all():
            raise NumericalError(f"The {self.matrix.kind} can't be inverted", fix="use a larger damping")
        note(f"warning: the {self.matrix.kind} curves downwards somewhere, even with its damping: scores are of a saddle")
        return lambda b_PQ: torch.linalg.lu_solve(factor, pivots, b_PQ)


def formed(matrix: Matrix, flat: Flat, like: Tensor, made_from: Callable[[], Mapping[str, Any]], **saving: Any) -> Tensor:
    """The matrix `[P, P]` in float64, `COLUMNS` columns a pass; `made_from` is the provenance of what is kept meanwhile."""
    multiply, starts = flat.multiply(matrix), range(0, flat.size, COLUMNS)
    with searching(made_from, len(starts), **saving) as (state, after):
        empty = {"matrix": like.new_zeros(flat.size, flat.size, dtype=torch.float64), "steps": torch.tensor(0)}
        done = {**empty, **(state or {})}
        done["matrix"] = done["matrix"].to(like.device)
        for start in starts[int(done["steps"]) :]:
            columns = torch.eye(flat.size, dtype=like.dtype, device=like.device)[start : start + COLUMNS]
            done["matrix"][start : start + COLUMNS] = multiply(columns).double()
            done["steps"] += 1
            after(done, None)
    return (done["matrix"] + done["matrix"].T) / 2


def refuse_large(matrix: Matrix, fix: str) -> None:
    """Raise UsageError for the matrix of more than `LARGEST` weights; `fix` says what to do instead."""
    if (size := sum(site.shape[0] * site.shape[1] for site in matrix.sites.values())) > LARGEST:
        raise UsageError(
            f"The {matrix.kind} of so many weights is not formed",
            given=f"{size:,} weights in {len(matrix.sites)} modules: {8 * size**2 / 2**30:,.0f} GiB in float64, twice",
            accepted=f"{LARGEST:,} weights at most",
            fix=fix,
        )


def mean_eigenvalue(matrix_PP: Tensor) -> float:
    """Trace / P. Raises NumericalError where it is not above zero, as that of a Hessian need not be."""
    mean = float(matrix_PP.trace()) / len(matrix_PP)
    if not mean > 0:
        raise NumericalError("The mean eigenvalue is not above zero", given=f"{mean:g}", fix="give absolute_damping instead")
    return mean

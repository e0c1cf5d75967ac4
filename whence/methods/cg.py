"""Conjugate gradients: the inverse of a whole curvature matrix on all queries at once, nothing formed."""

from __future__ import annotations

from typing import Any, Literal

from whence.engine.matrices import GaussNewton, Kind, matrix_of
from whence.engine.point import Point
from whence.engine.search import searching
from whence.fitting.curvature import Curvature
from whence.gradients import Dense, Gradients
from whence.linalg.krylov import block_cg
from whence.methods.base import Recipe, Request
from whence.methods.damping import Damped, Damping, damping_of
from whence.methods.nystroem import Nystroem
from whence.operators import Identity, Operator
from whence.progress import note
from whence.settings import AtLeastZero, Count, Positive, setting, valid
from whence.store.fingerprint import fingerprint_operator, fingerprint_tensors
from whence.store.scores import Scores

CAUTION = 10
"""How many times the damping the preconditioner has: what EK-FAC neglects, the coupling of modules, must not be blown up."""


class Solved(Damped):
    """Which damped matrix is inverted, and how closely."""

    matrix: Kind = setting("gauss-newton", "Curvature matrix; the Hessian only where its damped form is positive definite.")
    near: Literal["ekfac", "nystroem", "none"] = setting("ekfac", "Preconditioner, which moves only the time; none: plain.")
    rank: Count = setting(64, "Of near=nystroem.")
    tolerance: Positive = setting(1e-4, "Residual of each query's solution, as a share of its gradient.")
    iterations: Count = setting(200, "Maximum steps.")


def conjugate_gradients(request: Request, settings: Solved) -> Scores:
    """`grad m(query)^T (G + lambda)^-1 grad log p(row)`, all modules together, solved for all queries at once.

    A number as damping is in units of the EK-FAC factors' mean eigenvalue over all modules. The largest residual and the steps
    are in `about`.
    """
    damping = damping_of(request, settings).at(lambda: request.curvature().mean_eigenvalue)
    near = preconditioner(request, settings, damping)
    matrix = matrix_of(settings.matrix, request.point, near.names)
    kept: dict[str, Any] = {"tolerance": settings.tolerance, "iterations": settings.iterations, "out": request.place("search")}
    return request.score(ConjugateGradients(matrix + damping.operator, near, **kept))


def preconditioner(request: Request, settings: Solved, damping: Damping) -> Operator:
    """What is near the damped matrix's inverse."""
    if settings.near == "ekfac":
        return damping.times(CAUTION).inverse(request.curvature())
    if settings.near == "none":
        return Identity(request.names)
    matrix = matrix_of(settings.matrix, request.point, request.names)
    return Nystroem(matrix, damping, settings.rank, rest="smallest", out=request.place("near"))


def gauss_newton_inverse(point: Point, curvature: Curvature, damping: float = 0.1, **settings: Any) -> ConjugateGradients:
    """`(G + lambda)^-1`, G being the Gauss-Newton matrix of the point's rows, over all modules of the curvature together.

    lambda is `damping` times the curvature's mean eigenvalue over all modules; `settings` are those of `ConjugateGradients`.
    """
    names = curvature.operator.names
    absolute = Damping(valid(AtLeastZero, damping, "damping") * curvature.mean_eigenvalue, names)
    matrix = GaussNewton(point, names) + absolute.operator
    return ConjugateGradients(matrix, absolute.times(CAUTION).inverse(curvature), **settings)


class ConjugateGradients(Operator):
    """`matrix^-1` by block conjugate gradients (O'Leary 1980), preconditioned by an operator `near` it.

    Each solution has a residual of at most `tolerance`. `saving` is where the search is kept (`out`), so that a killed one
    resumes, and how often (`save_every` seconds).
    """

    def __init__(self, matrix: Operator, near: Operator, *, tolerance: float = 1e-4, iterations: int = 200, **saving: Any):
        self.matrix, self.near, self.saving = matrix, near, saving
        self.tolerance, self.iterations = valid(Positive, tolerance, "tolerance"), valid(Count, iterations, "iterations")
        self.names = near.names
        self.label = f"({matrix.label}), inverse by conjugate gradients to {tolerance:g}"

    def identity(self) -> Any:
        """The matrix, and how closely it is inverted; the preconditioner moves nothing but the time."""
        return {"inverse": self.matrix.identity(), "tolerance": self.tolerance}

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Solve for all gradients at once. Raises NumericalError where `iterations` are not enough."""
        b = {name: gradients[name].dense().w_BOI for name in self.names}
        matrix, near = (operator.on_tensors(b[self.names[0]]) for operator in (self.matrix, self.near))

        def made_from() -> dict[str, Any]:
            return {"stage": "solve", **fingerprint_operator(self), "of": fingerprint_tensors(b)}

        with searching(made_from, self.iterations, **self.saving) as (state, after):
            limits: dict[str, Any] = {"tolerance": self.tolerance, "iterations": self.iterations}
            found = block_cg(matrix, b, near, state=state, after=after, **limits)
        worst, steps = float(found.residual_Q.max()), found.steps + self.about.get("steps", 0)
        self.about = {"residual": max(worst, self.about.get("residual", 0.0)), "steps": steps}
        note(f"conjugate gradients: {found.steps} steps, residual at most {worst:.1e}")
        return {name: Dense(w_QOI) for name, w_QOI in found.x.items()}


RECIPES = (
    Recipe(
        "cg",
        "Conjugate gradients",
        "O'Leary 1980; preconditioned by EK-FAC or (Frangella et al. 2023, eq. 1.3) Nystroem",
        conjugate_gradients,
        Solved,
        uses=("factors", "training"),
        price="a fit, and a product of all queries with the rows' curvature a step",
    ),
)

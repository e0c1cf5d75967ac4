"""What LiSSA, ASTRA and FastIF share: a damped curvature matrix inverted by steps that read a few rows each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from whence.engine.draws import drawn_rows
from whence.engine.matrices import Kind, Matrix, matrix_of
from whence.engine.search import searching
from whence.gradients import Dense, Gradients
from whence.linalg.krylov import Block, Map
from whence.linalg.power import spectrum_ends
from whence.linalg.richardson import relative_norms, richardson
from whence.methods.base import Request
from whence.methods.damping import Damped, Damping, damping_of
from whence.operators import Identity, Operator
from whence.progress import note, notes_only, stage
from whence.settings import SEED, Amount, AtLeastZero, Count, Positive, setting
from whence.store.fingerprint import fingerprint_operator, fingerprint_tensors

PROBES, PRODUCTS = 3, 8
"""Batches whose largest eigenvalue is looked for, and the products that each of them takes."""


class Steps(Damped):
    """Which damped matrix is inverted, and by what steps."""

    matrix: Kind = setting("gauss-newton", "Curvature matrix; the Hessian only where its damped form is positive definite.")
    depth: Count = setting(1000, "Maximum steps.")
    batch: Count = setting(16, "Rows that a step reads.")
    scale: Positive | None = setting(None, "What a step is divided by; default: `safety` x the largest eigenvalue.")
    safety: Positive = setting(1.0, "Scale in units of the largest eigenvalue that a few batches have.")
    tolerance: AtLeastZero = setting(0.0, "Residual of all queries, as a share of their gradients, that ends the steps.")
    seed: Amount = setting(0, SEED)


def stochastic_inverse(request: Request, settings: Steps, name: str, precondition: bool, **how: Any) -> StochasticInverse:
    """`(matrix + damping)^-1` of the request's rows; with `precondition` by way of the factors with the same damping."""
    damping = damping_of(request, settings).at(lambda: request.curvature().mean_eigenvalue)
    near = damping.inverse(request.curvature()) if precondition else Identity(request.names)
    matrix = matrix_of(settings.matrix, request.point, request.names)
    return StochasticInverse(matrix, damping, near, settings, name, how, out=request.place("search"))


class StochasticInverse(Operator):
    """`(matrix + damping)^-1` of all queries at once, by `richardson`, whose steps see the matrix of a few rows each.

    Residuals are multiplied with `near`. The first iterate is `near @ gradients`, divided by the scale where `short` is in
    `how`; what else is there goes to `richardson`. `out` is where the search is kept, so that a killed one resumes, and
    `save_every` how often, in seconds.
    """

    def __init__(
        self,
        matrix: Matrix,
        damping: Damping,
        near: Operator,
        settings: Steps,
        name: str,
        how: Mapping[str, Any],
        **saving: Any,
    ):
        self.matrix, self.damping, self.near, self.settings = matrix, damping, near, settings
        self.how, self.saving, self.names = dict(how), saving, matrix.names
        self.label = f"({matrix.label}), inverse with {damping.label} by {name}"

    def identity(self) -> Any:
        """The matrix, and all that decides the steps."""
        inverted = {"inverse": self.matrix.identity(), "damping": self.damping.identity(), "near": self.near.identity()}
        return {**inverted, "steps": self.settings.as_json(), "how": self.how}

    def apply_to(self, gradients: Gradients) -> Gradients:
        """All solutions, and with one more pass their residuals. Raises NumericalError where the steps diverge."""
        settings, count = self.settings, len(self.matrix.point.examples.usable)
        b = {name: gradients[name].dense().w_BOI for name in self.names}
        near = self.near.on_tensors(b[self.names[0]])
        scale, how = settings.scale or settings.safety * self.largest(b, near), dict(self.how)
        first = 1 / scale if how.pop("short", False) else 1.0
        start = {name: first * part for name, part in near(b).items()}

        def made_from() -> dict[str, Any]:
            return {"stage": "solve", **fingerprint_operator(self), "of": fingerprint_tensors(b)}

        def advice() -> str:
            ends = spectrum_ends(self.damped(), b, near, steps=2 * PRODUCTS)
            if ends.smallest <= 0:
                return "use a larger damping, or a matrix that is never negative (gauss-newton or fisher, not the Hessian)"
            return f"use a scale of {max(self.largest(b, near), ends.largest):.3g} or more, or none: it is then found"

        with searching(made_from, how.get("repeats", 1) * settings.depth, **self.saving) as (state, after):
            saved: dict[str, Any] = {"state": state, "after": after, "advice": advice, "start": start, "scale": scale}
            until = {"steps": settings.depth, "window": max(1, count // settings.batch), "tolerance": settings.tolerance}
            found = richardson(lambda step, x: self.sampled(step)(x), b, near, **how, **until, **saved)
            residual_Q = relative_norms({name: b[name] - part for name, part in self.damped()(found.x).items()}, b)
        passes = found.steps * min(settings.batch, count) / count
        self.about = {"damping": self.damping.mean, "scale": scale, "steps": found.steps, "passes": passes}
        self.about |= {"residual": float(residual_Q.max())}
        note(f"{found.steps} steps, {passes:.3g} passes over the rows, residual at most {float(residual_Q.max()):.1e}")
        return {name: Dense(w_QOI) for name, w_QOI in found.x.items()}

    def largest(self, like: Block, near: Map) -> float:
        """The largest eigenvalue of a few batches' damped matrices, times `near`."""
        with stage("scale", PROBES, "batches") as advance, notes_only():
            found = []
            for step in range(PROBES):
                found.append(spectrum_ends(self.sampled(step), like, near, steps=PRODUCTS).largest)
                advance(1)
        return max(found)

    def sampled(self, step: int) -> Map:
        """Products with the damped matrix of a step's rows."""
        usable, chosen = self.matrix.point.examples.usable, self.settings
        return self.damped(drawn_rows(usable, chosen.batch, step, chosen.seed))

    def damped(self, rows: Sequence[int] | None = None) -> Map:
        """Products with the damped matrix of these rows (default: of all)."""
        rows = self.matrix.point.examples.usable if rows is None else rows

        def product(x: Block) -> dict[str, Tensor]:
            sums, damping = self.matrix.product(dict(x), rows), self.damping.operator.on_tensors(x[self.names[0]])(x)
            return {name: sums[name] / len(rows) + damping[name] for name in x}

        return product

"""Heads and adapters that a stage of training begins anew, above a trunk that it takes over from the stage before.

A head `H` that is fitted to a trunk `W` follows it: at the optimum `dH/dW = -H_HH^-1 H_HW`, with the blocks of the Hessian of
the stage's mean loss. A change of the trunk thus moves a measurement by `w - H_WH H_HH^-1 h`, where `w` and `h` are the
measurement's gradients (the implicit function theorem; Chen et al. 2020 for a frozen trunk below a new head). The same holds
of adapters, `H`, in a base model that is frozen, `W`.

    operator = pretrained.inverse() @ transport @ CrossTerm(tuned, trunk, head, damping)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from whence.engine.matrices import Hessian, Kind, Matrix, matrix_of
from whence.engine.point import Point
from whence.errors import NumericalError, UsageError
from whence.gradients import Dense, Gradients
from whence.methods.cg import ConjugateGradients
from whence.methods.course import Course
from whence.methods.damping import Damping
from whence.methods.dense import DenseInverse
from whence.operators import Identity, Operator, Spectral
from whence.operators.flat import Flat

DENSE = 1024
"""Weights of a head up to which its curvature is formed, in `DENSE / 64` passes of the rows, forwards through the trunk."""

TOLERANCE, ITERATIONS = 1e-2, 500
"""Residual of a larger head's solution as a share of its gradient, and steps at most: adapters are ill-conditioned."""

PROBES = 16
"""Random vectors that a trace is estimated with (Hutchinson 1990): its relative error is below `sqrt(2 / PROBES)`."""


class CrossTerm(Operator):
    """`w - H_WH (H_HH + damping)^-1 h`: gradients of a trunk and its head as gradients of the trunk that the head follows.

    `H_WH` is the Hessian's block, exact: one pass over the stage's rows for all queries at once, in which each batch goes
    forwards through the model once, and back through it once per query. `matrix` is what `H_HH` is taken for; for a linear
    head Gauss-Newton matrix and Hessian are the same, for adapters the Hessian may have negative eigenvalues. Heads of up to
    `dense` weights are inverted as a matrix in float64; others by conjugate gradients, preconditioned by `near`, whose
    residual is noted and goes into `about`. `damping` is that of the head's training: its weight decay, and where it stopped
    early, 1 / sum of learning rates. `solving` are settings of `ConjugateGradients` (`tolerance`, `iterations`), and where the
    solution is kept meanwhile (`out`).
    """

    def __init__(
        self,
        point: Point,
        trunk: Sequence[str],
        head: Sequence[str],
        damping: Damping,
        *,
        matrix: Kind = "gauss-newton",
        near: Operator | None = None,
        dense: int = DENSE,
        **solving: Any,
    ):
        if not trunk or not head:
            raise UsageError(
                f"There is no {'head' if trunk else 'trunk'} for a cross term",
                given=f"{len(trunk)} modules of the trunk, {len(head)} of the head",
                accepted="one module or more of each",
            )
        self.names, self.head, self.damping = tuple(trunk), tuple(head), damping
        self.cross = Hessian(point, [*trunk, *head], along=head)
        self.inverse = _inverse(matrix_of(matrix, point, head), damping, near, dense, solving)
        count = f"{len(self.head)} module{'s' * (len(self.head) > 1)}"
        self.label = f"cross term of {count} of the head, ({self.inverse.label})"

    @property
    def reads(self) -> tuple[str, ...]:
        """The modules whose gradients it is given: trunk and head."""
        return self.names + self.head

    def identity(self) -> Any:
        """The head's inverse, and the rows whose Hessian it is."""
        return {"cross term": self.inverse.identity(), "trunk": list(self.names), "of": self.cross.identity()}

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Solve for the head, then one pass over the rows. Raises NumericalError where the head can't be solved for."""
        followed = self.cross @ (self.inverse @ {name: gradients[name] for name in self.head})
        self.about = {f"head {key}": value for key, value in self.inverse.about.items()}
        return {
            name: Dense(gradients[name].dense().w_BOI - followed[name].dense().w_BOI.to(gradients[name].dtype))
            for name in self.names
        }


def _inverse(matrix: Matrix, damping: Damping, near: Operator | None, dense: int, solving: dict[str, Any]) -> Operator:
    """`(matrix + damping)^-1`, formed where the matrix is small."""
    if sum(site.parameters for site in matrix.sites.values()) <= dense:
        return DenseInverse(matrix, damping, **{key: value for key, value in solving.items() if key in ("out", "save_every")})
    absolute = damping.at(lambda: estimated_mean_eigenvalue(matrix))
    chosen = {"tolerance": TOLERANCE, "iterations": ITERATIONS, **solving}
    return ConjugateGradients(matrix + absolute.operator, near or Identity(matrix.names), **chosen)


def estimated_mean_eigenvalue(matrix: Matrix, probes: int = PROBES, seed: int = 0) -> float:
    """Trace / P of a matrix that is not formed, in one pass over its rows (Hutchinson 1990)."""
    generator = torch.Generator().manual_seed(seed)
    flat = Flat({name: site.shape for name, site in matrix.sites.items()})
    signs_KP = (2 * torch.randint(2, (probes, flat.size), generator=generator) - 1).to(matrix.point.like)
    return float((signs_KP * flat.multiply(matrix)(signs_KP)).sum(dtype=torch.float64)) / (probes * flat.size)


class Held(Operator):
    """The proximal step of trunk and head together, exact: `alpha (S + alpha)^-1 (w - H_WH H_HH^-1 h)` in one solution.

    `S = H_WW - H_WH H_HH^-1 H_HW` is the Schur complement, `hessian` the whole matrix over trunk and head, formed, and
    `course` what is known of the training: the trunk was held where it began by `alpha = 1 / rates` and the head by nothing but
    weight decay, in the metric of Adam where that trained. Gradients of both are mapped to those of the trunk.
    """

    def __init__(self, hessian: Spectral, trunk: Sequence[str], course: Course, label: str):
        self.hessian, self.names, self.course = hessian, tuple(name for name in hessian.names if name in set(trunk)), course
        self.label = label

    @property
    def reads(self) -> tuple[str, ...]:
        """The modules of the matrix."""
        return self.hessian.names

    def identity(self) -> Any:
        """The matrix, the trunk, and how far the training went."""
        course, metric = self.course, self.course.metric
        held = {"rates": course.rates, "loss_scale": course.loss_scale, "weight_decay": course.weight_decay}
        return {"held": self.hessian.identity(), "trunk": list(self.names), **held, "metric": metric and metric.identity()}

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Solve; a module whose gradients are not given has those of zero. Raises NumericalError at a saddle."""
        flat, given = self.hessian.flat, next(iter(gradients.values())).dense().w_BOI
        absent = {name: Dense(given.new_zeros(len(given), *shape)) for name, shape in flat.shapes.items()}
        b_QP = flat.vectors({**absent, **{name: gradients[name] for name in self.reads if name in gradients}}).double()
        alpha_P, decay_P = self._diagonals(flat)
        matrix_PP = self.hessian.dense().double() / self.course.loss_scale + (alpha_P + decay_P).diag()
        factor, bad = torch.linalg.cholesky_ex(matrix_PP)
        if bad:
            raise NumericalError(
                "The loss of trunk and head curves downwards, even with what held the trunk and with weight decay",
                fix='curvature="gauss-newton", which never does, or a larger proximal',
            )
        found = flat.gradients((alpha_P * torch.cholesky_solve(b_QP.T, factor).T).to(given))
        return {name: found[name] for name in self.names}

    def _diagonals(self, flat: Flat) -> tuple[Tensor, Tensor]:
        """What holds each weight where it began, and at zero, `[P]` each."""
        ones = flat.gradients(self.hessian.lam_P.new_ones(1, flat.size).double())
        d_P = flat.vectors(ones if self.course.metric is None else {**ones, **(self.course.metric @ ones)})[0]
        trunk_P = flat.vectors({name: Dense(one.w_BOI * (name in self.names)) for name, one in ones.items()})[0]
        return d_P * trunk_P / self.course.rates, d_P * self.course.weight_decay

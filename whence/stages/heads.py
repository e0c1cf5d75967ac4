"""Heads and adapters that a stage of training begins anew, above a trunk that it takes over from the stage before.

A head `H` that is fitted to a trunk `W` follows it: at the optimum `dH/dW = -H_HH^-1 H_HW`, with the blocks of the Hessian of
the stage's mean loss. A change of the trunk thus moves a measurement by `w - H_WH H_HH^-1 h`, where `w` and `h` are the
measurement's gradients (the implicit function theorem; Chen et al. 2020 for a frozen trunk below a new head). The same holds
of adapters, `H`, in a base model that is frozen, `W`.

    operator = pretrained.inverse() @ transport @ CrossTerm(tuned, trunk, head, damping)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from whence.engine.matrices import Hessian, Kind, Matrix, matrix_of
from whence.engine.point import Point
from whence.errors import UsageError
from whence.gradients import Dense, Gradients
from whence.methods.cg import ConjugateGradients
from whence.methods.damping import Damping
from whence.methods.dense import DenseInverse
from whence.operators import BlockDiagonal, EigenBlock, Identity, Operator
from whence.operators.flat import Flat

DENSE = 1024
"""Weights of a head up to which its curvature is formed, in `DENSE / 64` passes of the rows, forwards through the trunk."""

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
        self.label = f"cross term of {len(self.head)} modules of the head, ({self.inverse.label})"

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
    return ConjugateGradients(matrix + absolute.operator, near or Identity(matrix.names), **solving)


def estimated_mean_eigenvalue(matrix: Matrix, probes: int = PROBES, seed: int = 0) -> float:
    """Trace / P of a matrix that is not formed, in one pass over its rows (Hutchinson 1990)."""
    generator = torch.Generator().manual_seed(seed)
    flat = Flat({name: site.shape for name, site in matrix.sites.items()})
    signs_KP = (2 * torch.randint(2, (probes, flat.size), generator=generator) - 1).to(matrix.point.like)
    return float((signs_KP * flat.multiply(matrix)(signs_KP)).sum(dtype=torch.float64)) / (probes * flat.size)


class Joint(Operator):
    """Trunk and head trained together: gradients of both at the end as gradients of the trunk that training began with, exact.

    "flow": `exp(-time (H + decay))` of all weights, of which the head's own start does not depend on the trunk. "proximal": a
    trunk held where it began by `alpha = 1 / time`, and a head at its optimum, `alpha (S + alpha)^-1 (w - H_WH H_HH^-1 h)` with
    `S = H_WW - H_WH H_HH^-1 H_HW`, in one solution with the whole Hessian. That is formed, in float64: `P` weights take
    `P / 64` passes over the rows and `8 P^2` bytes. `decay` is weight decay, which is added to the Hessian.
    """

    def __init__(
        self,
        point: Point,
        trunk: Sequence[str],
        head: Sequence[str],
        transport: Literal["flow", "proximal"],
        time: float,
        decay: float = 0.0,
        **saving: Any,
    ):
        self.names, self.head = tuple(trunk), tuple(head)
        self.transport, self.time, self.decay = transport, time, decay
        self.hessian = Hessian(point, [*trunk, *head])
        pull = {name: decay + (1 / time if transport == "proximal" and name in trunk else 0.0) for name in self.hessian.names}
        self.damping = Damping(1.0, self.hessian.names, _constants(self.hessian, pull))
        self.inverse = DenseInverse(self.hessian, self.damping, **saving)
        self.label = f"{transport} of trunk and head together, {time:g} of learning rates, {self.hessian.label}"

    @property
    def reads(self) -> tuple[str, ...]:
        """The modules whose gradients it is given: trunk and head."""
        return self.names + self.head

    def identity(self) -> Any:
        """The rows whose Hessian it is, and how long they were trained on."""
        return {self.transport: self.hessian.identity(), "time": self.time, "decay": self.decay, "trunk": list(self.names)}

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Solve, or flow back."""
        flat = Flat.of(gradients, self.hessian.names)
        b_QP = flat.vectors(gradients)
        if self.transport == "proximal":
            back_QP = self.inverse.solver(flat, b_QP)(b_QP.double().T).T / self.time
        else:
            back_QP = self._flown(flat, b_QP)
        found = flat.gradients(back_QP.to(b_QP))
        return {name: found[name] for name in self.names}

    def _flown(self, flat: Flat, b_QP: Tensor) -> Tensor:
        """`exp(-time (H + decay)) b`, by the eigenvectors of the Hessian."""
        value_P, vector_PP = torch.linalg.eigh(self.inverse.formed(flat, b_QP))
        left_P = torch.exp(-self.time * (value_P + self.decay))
        return (b_QP.double() @ vector_PP * left_P) @ vector_PP.T


def _constants(matrix: Matrix, values: dict[str, float]) -> BlockDiagonal:
    """A number for each module, as a diagonal matrix of the weights."""
    like = matrix.point.like
    blocks = {
        name: EigenBlock(None, None, like.new_full((), value).expand(*matrix.sites[name].shape))
        for name, value in values.items()
    }
    return BlockDiagonal(blocks, "a number for each module")

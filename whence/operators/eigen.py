"""Operators that are diagonal in a Kronecker-factored basis.

One block `(Q_O kron Q_I) diag(lambda_OI) (Q_O kron Q_I)^T` per module is identity, diagonal, K-FAC (Martens & Grosse
2015), EK-FAC (George et al. 2018) and eigenvalue-corrected Shampoo (Gupta et al. 2018), by what its bases and its
eigenvalues are. A function of the operator is the function of its eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whence.errors import NumericalError
from whence.gradients import Dense, Factored, Gradient, Gradients
from whence.linalg.rotation import Rotation
from whence.operators.base import Operator


@dataclass(frozen=True)
class EigenBlock:
    """Eigenvalues `lam_OI` in the basis `q_O` x `q_I` of a module's weight matrix; None stands for the identity basis."""

    q_O: Rotation | None
    q_I: Rotation | None
    lam_OI: Tensor

    def __matmul__(self, gradient: Gradient) -> Dense:
        return Dense(self.unrotate(self.rotate(gradient).w_BOI * self.lam_OI))

    def rotate(self, gradient: Gradient) -> Dense:
        """Coordinates of the gradients in the eigenbasis, `Q_O^T w Q_I`, `[B, O, I]`.

        A side is rotated before the summands are added up where these are fewer than the other side is wide.
        """
        if isinstance(gradient, Factored):
            tokens, (_, n_out, n_in) = gradient.g_BRO.shape[1], gradient.shape
            early_out, early_in = tokens < n_in, tokens < n_out
            g_BRO = self.q_O.rotate(gradient.g_BRO) if self.q_O and early_out else gradient.g_BRO
            a_BRI = self.q_I.rotate(gradient.a_BRI) if self.q_I and early_in else gradient.a_BRI
            w_BOI = g_BRO.mT @ a_BRI
        else:
            early_out = early_in = False
            w_BOI = gradient.w_BOI
        if self.q_O and not early_out:
            w_BOI = self.q_O.rotate(w_BOI.mT).mT
        if self.q_I and not early_in:
            w_BOI = self.q_I.rotate(w_BOI)
        return Dense(w_BOI)

    def unrotate(self, w_BOI: Tensor) -> Tensor:
        """Back from the eigenbasis, `Q_O w Q_I^T`."""
        if self.q_I:
            w_BOI = self.q_I.unrotate(w_BOI)
        return self.q_O.unrotate(w_BOI.mT).mT if self.q_O else w_BOI

    def quadratic(self, gradient: Gradient) -> Tensor:
        """`<w, block w>` of each example, `[B]`: one rotation, none back."""
        return (self.rotate(gradient).w_BOI.square() * self.lam_OI).sum((1, 2))

    def dense(self) -> Tensor:
        """The block as a matrix `[O*I, O*I]`, row-major in (O, I)."""
        n_out, n_in = self.lam_OI.shape
        q_O = self.q_O.dense() if self.q_O else torch.eye(n_out).to(self.lam_OI)
        q_I = self.q_I.dense() if self.q_I else torch.eye(n_in).to(self.lam_OI)
        q = torch.kron(q_O, q_I)
        return (q * self.lam_OI.flatten()) @ q.T

    def to(self, like: Tensor) -> EigenBlock:
        """The same in the dtype and on the device of `like`."""
        q_O, q_I = (q.to(like) if q else None for q in (self.q_O, self.q_I))
        return EigenBlock(q_O, q_I, self.lam_OI.to(like))


@dataclass(frozen=True)
class BlockDiagonal(Operator):
    """One EigenBlock per module; modules don't interact."""

    blocks: Mapping[str, EigenBlock]
    label: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The modules it acts on."""
        return tuple(self.blocks)

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Apply each module's block; modules without one are left out."""
        return {name: block @ gradients[name] for name, block in self.blocks.items() if name in gradients}

    def dense(self) -> dict[str, Tensor]:
        """Each block as a matrix."""
        return {name: block.dense() for name, block in self.blocks.items()}

    def apply(self, function: Callable[[Tensor], Tensor], label: str = "a function") -> BlockDiagonal:
        """The same function of every block: `function` maps its eigenvalues `[O, I]`."""
        blocks = {name: replace(block, lam_OI=function(block.lam_OI)) for name, block in self.blocks.items()}
        return BlockDiagonal(blocks, f"{self.label}, {label}")

    def inverse(self, damping: float = 0.1, *, absolute: float | None = None) -> BlockDiagonal:
        """`(block + lambda)^-1`, lambda being `damping` times the module's mean eigenvalue, or `absolute` everywhere.

        The relative form with 0.1 is the heuristic of Grosse et al. 2023, section 3.1. Raises NumericalError where an
        eigenvalue and its damping are both zero.
        """
        inverted = {}
        for name, block in self.blocks.items():
            damped = block.lam_OI + (damping * block.lam_OI.mean() if absolute is None else absolute)
            if not bool((damped > 0).all()):
                raise NumericalError(
                    f"The curvature of {name} can't be inverted",
                    given=f"{int((damped <= 0).sum())} eigenvalues of 0, damping {damping if absolute is None else absolute}",
                    fix="use a damping above zero (absolute=1e-8 where a module has no curvature at all)",
                )
            inverted[name] = replace(block, lam_OI=damped.reciprocal())
        how = f"damping {damping:g} x mean eigenvalue" if absolute is None else f"damping {absolute:g}"
        return BlockDiagonal(inverted, f"{self.label}, inverse with {how}")

    def quadratic(self, gradients: Gradients) -> Tensor:
        """`<g, operator g>` of each example, `[B]`."""
        return torch.stack([block.quadratic(gradients[name]) for name, block in self.blocks.items() if name in gradients]).sum(
            0
        )

    def tensors(self) -> dict[str, Tensor]:
        """The eigenvalues: they change with whatever the operator was fitted on."""
        return {name: block.lam_OI for name, block in self.blocks.items()}

    def to(self, like: Tensor) -> BlockDiagonal:
        """The same in the dtype and on the device of `like`."""
        return BlockDiagonal({name: block.to(like) for name, block in self.blocks.items()}, self.label)

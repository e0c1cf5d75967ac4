"""A matrix over the weights of all modules together, by its eigenvectors: for small models, where nothing is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from whence.errors import NumericalError
from whence.gradients import Dense, Gradients
from whence.operators.base import Operator
from whence.operators.eigen import BlockDiagonal
from whence.operators.flat import Flat
from whence.settings import valid_damping


@dataclass(frozen=True)
class Spectral(Operator):
    """`Q diag(lam) Q^T` over the `P` weights of the modules in `flat`, one vector; functions of it are those of `lam`.

    Of modules that are not among the gradients it is given, the gradients are taken for zero.
    """

    flat: Flat
    q_PP: Tensor
    lam_P: Tensor
    label: str = ""

    @classmethod
    def of(cls, matrix_PP: Tensor, shapes: Mapping[str, tuple[int, int]], label: str = "") -> Spectral:
        """That of a symmetric matrix, whose eigenvectors are found."""
        lam_P, q_PP = torch.linalg.eigh(matrix_PP)
        return cls(Flat(dict(shapes)), q_PP, lam_P, label)

    @property
    def names(self) -> tuple[str, ...]:
        """The modules it acts on."""
        return tuple(self.flat.shapes)

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Multiply with the gradients of its modules, all at once."""
        own = [name for name in self.names if name in gradients]
        given = gradients[own[0]].dense().w_BOI
        absent = {name: Dense(given.new_zeros(len(given), *shape)) for name, shape in self.flat.shapes.items()}
        v_KP = self.flat.vectors({**absent, **{name: gradients[name] for name in own}}).to(self.q_PP)
        found = self.flat.gradients((((v_KP @ self.q_PP) * self.lam_P) @ self.q_PP.T).to(given))
        return dict(found)

    def identity(self) -> Any:
        """Its modules, eigenvalues and eigenvectors."""
        return {"modules": list(self.names), "eigenvalues": self.lam_P, "eigenvectors": self.q_PP}

    def dense(self) -> Tensor:
        """The matrix `[P, P]`."""
        return (self.q_PP * self.lam_P) @ self.q_PP.T

    def apply(self, function: Callable[[Tensor], Tensor], label: str = "a function") -> Spectral:
        """The function of it: `function` maps its eigenvalues `[P]`."""
        return replace(self, lam_P=function(self.lam_P), label=f"{self.label}, {label}")

    def only(self, names: Sequence[str]) -> Spectral:
        """The block of these modules, all others held still."""
        if set(names) == set(self.names):
            return self
        places = torch.arange(self.flat.size).split([math.prod(shape) for shape in self.flat.shapes.values()])
        chosen = torch.cat([place for name, place in zip(self.names, places, strict=True) if name in names])
        shapes = {name: shape for name, shape in self.flat.shapes.items() if name in names}
        return Spectral.of(self.dense()[chosen][:, chosen], shapes, self.label)

    def between(self, diagonal: BlockDiagonal) -> Spectral:
        """`diagonal @ itself @ diagonal`, where the diagonal multiplies each weight by its own number."""
        ones = self.flat.gradients(self.lam_P.new_ones(1, len(self.lam_P)))
        root_P = self.flat.vectors(diagonal @ ones)[0].to(self.lam_P)
        return Spectral.of(root_P[:, None] * self.dense() * root_P, self.flat.shapes, f"{self.label}, between {diagonal.label}")

    def inverse(self, damping: float = 0.1, *, absolute: float | None = None) -> Spectral:
        """`(matrix + lambda)^-1`, lambda being `damping` times the mean eigenvalue of all weights, or `absolute`.

        Raises UsageError for a damping below zero, NumericalError where an eigenvalue with its damping is not above zero.
        """
        damping, absolute = valid_damping(damping, absolute)
        damped_P = self.lam_P + (damping * self.lam_P.mean() if absolute is None else absolute)
        if not bool((damped_P > 0).all()):
            raise NumericalError(
                "The curvature can't be inverted",
                given=f"{int((damped_P <= 0).sum())} eigenvalues that are not above zero with their damping",
                fix="use a larger damping",
            )
        how = f"damping {damping:g} x mean eigenvalue" if absolute is None else f"damping {absolute:g}"
        return replace(self, lam_P=damped_P.reciprocal(), label=f"{self.label}, inverse with {how}")

"""Inverses of a damped curvature matrix by its leading eigenpairs, all modules together: what Arnoldi and Nystroem share."""

from __future__ import annotations

import abc
from typing import Any, Literal

import torch
from torch import Tensor

from whence.engine.matrices import Matrix
from whence.engine.search import searching
from whence.errors import UsageError
from whence.gradients import Gradients
from whence.methods.damping import Damping
from whence.operators import Operator
from whence.operators.flat import Flat
from whence.store.fingerprint import fingerprint_operator

Rest = Literal["zero", "smallest", "infinite"]
"""What the eigenvalues beyond the leading ones are taken to be: 0, as small as the smallest of these, or so large that their
directions drop out."""


class LowRankInverse(Operator):
    """`V (S + lambda)^-1 V^T + (I - V V^T) / (rest + lambda)`, `V S V^T` being the leading part of the matrix.

    In the metric of the damping: of `M^(-1/2) matrix M^(-1/2)`, and between two more `M^(-1/2)`. `saving` is where the search
    for the eigenpairs is kept (`out`), so that a killed one resumes, and how often (`save_every` seconds).
    """

    def __init__(self, matrix: Matrix, damping: Damping, rest: Rest = "zero", **saving: Any):
        if damping.factor == 0 and rest == "zero":
            raise UsageError(
                "Without a damping the complement of the leading eigenvectors has no inverse",
                given="damping 0",
                fix="a damping above zero, or complement=False",
            )
        self.matrix, self.damping, self.rest, self.saving = matrix, damping, rest, saving
        self.names, self.label = matrix.names, f"{matrix.label}, inverse with {damping.label} by {self.way}"
        self._pairs: tuple[Tensor, Tensor] | None = None

    way: str
    """How the eigenpairs are found, for people."""

    @abc.abstractmethod
    def settings(self) -> Any:
        """What of the search for eigenpairs moves numbers."""

    @abc.abstractmethod
    def steps(self) -> int:
        """Products that the search takes at most."""

    @abc.abstractmethod
    def search(self, multiply: Any, like_P: Tensor, state: Any, after: Any) -> tuple[Tensor, Tensor]:
        """The eigenpairs, `[K]` and `[K, P]`, of what `multiply` multiplies `[B, P]` with."""

    def identity(self) -> Any:
        """Which matrix, how it is damped, and how its eigenpairs are found."""
        found = {type(self).__name__: self.settings(), "rest": self.rest}
        return {**found, "inverse": self.matrix.identity(), **self.damping.identity()}

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Find the eigenpairs unless they are known, and apply it."""
        flat, root = Flat.of(gradients, self.names), self.damping.root
        if self._pairs is None:
            self._pairs = self.pairs(flat, gradients[self.names[0]].dense().w_BOI)
        values_K, v_KP = self._pairs
        w_QP = flat.vectors(root @ gradients)
        beyond = {"zero": 0.0, "smallest": float(values_K[-1]), "infinite": torch.inf}[self.rest] + self.damping.factor
        along_QK = w_QP @ v_KP.T
        w_QP = (along_QK / (values_K + self.damping.factor) - along_QK / beyond) @ v_KP + w_QP / beyond
        return root @ flat.gradients(w_QP)

    def pairs(self, flat: Flat, like: Tensor) -> tuple[Tensor, Tensor]:
        """The eigenpairs, by a search that resumes."""
        root = self.damping.root
        multiply = flat.multiply(root @ self.matrix @ root)

        def made_from() -> dict[str, Any]:
            return {"stage": "solve", **fingerprint_operator(self)}

        with searching(made_from, self.steps(), **self.saving) as (state, after):
            values_K, v_KP = self.search(multiply, like.new_empty(flat.size), state, after)
        self.about = {"eigenvalues": len(values_K), "largest": float(values_K.max()), "smallest": float(values_K[-1])}
        return values_K, v_KP

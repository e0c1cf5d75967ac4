"""Influence with a randomised Nystroem approximation of a curvature matrix, all modules together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from whence.engine.matrices import Matrix, matrix_of
from whence.linalg.spectrum import nystroem, random_vectors
from whence.methods.base import Recipe, Request
from whence.methods.damping import Damped, Damping, damping_of
from whence.methods.lowrank import LowRankInverse, Rest
from whence.settings import Amount, Count, setting
from whence.store.scores import Scores

COLUMNS = 32
"""Random vectors multiplied with the matrix at a time."""


class Sketched(Damped):
    """Of which matrix, and with how many random vectors."""

    matrix: Literal["gauss-newton", "fisher", "empirical-fisher"] = setting("gauss-newton", "Curvature matrix.")
    rank: Count = setting(64, f"Random vectors that the matrix is multiplied with, {COLUMNS} in each pass over the rows.")
    seed: Amount = setting(0, "Seed of the random vectors.")


def nystroem_influence(request: Request, settings: Sketched) -> Scores:
    """`grad m(query)^T (U S U^T + lambda)^-1 grad log p(row)`, `U S U^T` being `(G W) (W^T G W)^-1 (G W)^T` for random `W`.

    Hataya & Yamada 2023, with the sketch of Frangella, Tropp & Udell 2023. A number as damping is in units of the EK-FAC
    factors' mean eigenvalue. The eigenvalues' range is in `about`.
    """
    damping = damping_of(request, settings).at(lambda: request.curvature().mean_eigenvalue)
    matrix = matrix_of(settings.matrix, request.point, request.names)
    return request.score(Nystroem(matrix, damping, settings.rank, settings.seed, out=request.place("search")))


class Nystroem(LowRankInverse):
    """Eigenpairs of a sketch. With `rest` "smallest" it is the preconditioner of Frangella, Tropp & Udell 2023, eq. 1.3."""

    def __init__(self, matrix: Matrix, damping: Damping, rank: int, seed: int = 0, rest: Rest = "zero", **saving: Any):
        self.rank, self.seed, self.way = rank, seed, f"Nystroem approximation of rank {rank}"
        super().__init__(matrix, damping, rest, **saving)

    def settings(self) -> Any:
        """How many random vectors, and which."""
        return [self.rank, self.seed]

    def steps(self) -> int:
        """Passes."""
        return -(-self.rank // COLUMNS)

    def search(self, multiply: Any, like_P: Tensor, state: Any, after: Any) -> tuple[Tensor, Tensor]:
        """Of a sketch that is made `COLUMNS` vectors at a time."""
        omega_KP = random_vectors(self.rank, like_P, self.seed)
        done = state or {"product": torch.zeros_like(omega_KP), "steps": torch.tensor(0)}
        done = {"product": done["product"].to(omega_KP), "steps": done["steps"]}
        for start in range(int(done["steps"]) * COLUMNS, len(omega_KP), COLUMNS):
            done["product"][start : start + COLUMNS] = multiply(omega_KP[start : start + COLUMNS])
            done["steps"] += 1
            after(done, None)
        return nystroem(omega_KP, done["product"])


RECIPES = (
    Recipe(
        "nystroem",
        "Nystroem",
        "Frangella et al. 2023, algorithm 2.1; Hataya & Yamada 2023",
        nystroem_influence,
        Sketched,
        uses=("factors", "training"),
        price=f"a product of {COLUMNS} vectors with the rows' curvature for that much rank",
    ),
)

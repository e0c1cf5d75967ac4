"""Influence along the leading eigenvectors of a curvature matrix, found by Arnoldi's iteration (Schioppa et al. 2022)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from whence.engine.matrices import Kind, Matrix, matrix_of
from whence.linalg.spectrum import block_lanczos, largest_pairs, random_vectors
from whence.methods.base import Recipe, Request
from whence.methods.damping import Damped, Damping, damping_of
from whence.methods.lowrank import LowRankInverse
from whence.settings import Amount, Count, setting
from whence.store.scores import Scores


class Iterated(Damped):
    """How many eigenpairs, of which matrix, and what becomes of the rest."""

    matrix: Kind = setting("gauss-newton", "Curvature matrix.")
    top: Count = setting(50, "Eigenpairs to keep, the largest by absolute value.")
    vectors: Count = setting(100, "Vectors of the Krylov space.")
    block: Count = setting(4, "Vectors multiplied with the matrix at a time: vectors / block passes over the rows.")
    complement: bool = setting(True, "Invert the damping where no eigenpair was kept; if not, nothing is left there.")
    seed: Amount = setting(0, "Seed of the vectors that it starts with.")


def arnoldi(request: Request, settings: Iterated) -> Scores:
    """`grad m(query)^T (V (S + lambda)^-1 V^T + (I - V V^T) / lambda) grad log p(row)`, all modules together.

    `S` and `V` are Ritz pairs of the whole matrix; without the complement it is that of Schioppa et al. 2022, whose
    `lambda` is 0. A number as damping is in units of the EK-FAC factors' mean eigenvalue. The eigenvalues' range is in `about`.
    """
    damping = damping_of(request, settings).at(lambda: request.curvature().mean_eigenvalue)
    matrix = matrix_of(settings.matrix, request.point, request.names)
    return request.score(Arnoldi(matrix, damping, settings, out=request.place("search")))


class Arnoldi(LowRankInverse):
    """Eigenpairs from a Krylov space."""

    def __init__(self, matrix: Matrix, damping: Damping, chosen: Iterated, **saving: Any):
        self.chosen, self.way = chosen, f"{chosen.top} of {chosen.vectors} Ritz pairs"
        super().__init__(matrix, damping, "zero" if chosen.complement else "infinite", **saving)

    def settings(self) -> Any:
        """How many vectors, and which."""
        return [self.chosen.top, self.chosen.vectors, self.chosen.block, self.chosen.seed]

    def steps(self) -> int:
        """Passes."""
        return -(-self.chosen.vectors // self.chosen.block)

    def search(self, multiply: Any, like_P: Tensor, state: Any, after: Any) -> tuple[Tensor, Tensor]:
        """Of the largest Ritz values."""
        start_BP = random_vectors(self.chosen.block, like_P, self.chosen.seed)
        found = block_lanczos(multiply, start_BP, self.chosen.vectors, state=state, after=after)
        return largest_pairs(*found, self.chosen.top)


RECIPES = (
    Recipe(
        "arnoldi",
        "Arnoldi",
        "Schioppa et al. 2022",
        arnoldi,
        Iterated,
        uses=("factors", "training"),
        price="a product of block vectors with the rows' curvature a step",
    ),
)

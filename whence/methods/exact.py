"""Influence with a curvature matrix that is formed and inverted: for small models, where it is what others approximate."""

from __future__ import annotations

import functools

from whence.engine.matrices import Kind, matrix_of
from whence.methods.base import Recipe, Request
from whence.methods.damping import Damped, damping_of
from whence.methods.dense import COLUMNS, DenseInverse, refuse_large
from whence.store.scores import Scores


def exact(request: Request, settings: Damped, *, kind: Kind) -> Scores:
    """`grad m(query)^T (C + lambda)^-1 grad log p(row)`, `C [P, P]` being the matrix of the mean loss over all rows.

    A number as damping is in units of the matrix's own mean eigenvalue, trace / P. Raises UsageError for more than
    `LARGEST` weights, NumericalError where the damped matrix can't be inverted.
    """
    matrix = matrix_of(kind, request.point, request.names)
    refuse_large(
        matrix, f"fewer modules (modules='last-1'), or method cg with matrix={kind}: the same to its tolerance, nothing formed"
    )
    return request.score(DenseInverse(matrix, damping_of(request, settings), out=request.place("search")))


SOURCES: dict[Kind, tuple[str, str]] = {
    "hessian": ("Hessian", "Koh & Liang 2017, eq. 2"),
    "gauss-newton": ("Gauss-Newton", "Bae et al. 2022; Schraudolph 2002"),
    "fisher": ("Fisher", "Martens 2020, section 5"),
    "empirical-fisher": ("Empirical Fisher", "Martens 2020, section 11"),
}

RECIPES = tuple(
    Recipe(
        kind,
        f"{title}, exact inverse",
        source,
        functools.partial(exact, kind=kind),
        Damped,
        uses=("training",),
        price=f"a product with the rows' curvature for {COLUMNS} weights at a time",
    )
    for kind, (title, source) in SOURCES.items()
)

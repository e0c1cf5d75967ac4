"""Gram matrices of long, thin matrices: only the half that symmetry doesn't give away."""

from __future__ import annotations

from torch import Tensor

from whence.cost import covariance, panels


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add `rows^T rows` of `rows [m, n]` to `total [n, n]`: to its lower triangle, and to parts of the upper that mean nothing.

    Each panel of the sum's rows is multiplied up to its last column: a blocked symmetric rank-k update, at little more
    than half the work. (Panels of columns, whose results lie scattered in memory, take up to a quarter longer.) A product
    in a lower format than the sum's is rounded once per call.
    """
    width = rows.shape[1]
    for start, stop in panels(width, covariance(len(rows), width).parts):
        lower, left, right = total[start:stop, :stop], rows[:, start:stop].T, rows[:, :stop]
        if rows.dtype == total.dtype:
            lower.addmm_(left, right)
        else:
            lower.add_(left @ right)

"""How large the eigenvalues of a symmetric operator are, from a few products: the ends of its spectrum by Lanczos' method.

Block vectors are those of `whence.linalg.krylov`: named parts, here with one vector each, `{name: [1, ...]}`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.linalg import eigvalsh_tridiagonal

from whence.errors import NumericalError
from whence.linalg.krylov import Block, Map, inner

DOUBT = 0.01
"""Probability that `bound` is too low."""


@dataclass(frozen=True)
class Ends:
    """The largest and the smallest eigenvalue that `steps` products found: `largest` is never above the true one.

    `bound` is above the true one, but for a probability of `DOUBT`; infinite where the steps are too few to tell.
    """

    largest: float
    smallest: float
    bound: float
    steps: int


def spectrum_ends(operator: Map, like: Block, precondition: Map = dict, *, steps: int = 10, seed: int = 0) -> Ends:
    """The ends of the spectrum of `M^-1 A`, `A` being the operator and `precondition` the map `M^-1` (default: none).

    Lanczos' recurrence (Golub & Van Loan 2013, section 10.1) from a random vector in the shape of `like`, in the inner
    product of `M^-1`, in which `M^-1 A` is symmetric. Without re-orthogonalisation: eigenvalues that come twice move no end.
    The bound is that of Kuczynski & Wozniakowski (1992, theorem 4.2): of `P` weights, `k` steps miss a share `e` of the
    spectrum's width with a probability of at most `1.648 sqrt(P) exp(-sqrt(e) (2 k - 1))`; it is theirs for a matrix that is
    never negative, and without a preconditioner.

    Raises NumericalError where a product is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    q = {name: torch.randn(part[:1].shape, generator=generator).to(part) for name, part in like.items()}
    before, diagonal, beside = {name: torch.zeros_like(part) for name, part in q.items()}, [], []
    z, tiny = precondition(q), torch.finfo(next(iter(q.values())).dtype).eps
    length = float(inner(q, z)) ** 0.5
    while len(diagonal) < steps and length > tiny * max([1.0, *map(abs, diagonal)]):
        q, z = ({name: part / length for name, part in block.items()} for block in (q, z))
        moved = operator(z)
        diagonal.append(float(inner(z, moved)))
        if not math.isfinite(diagonal[-1]):
            raise NumericalError("The largest eigenvalue can't be found: a product is not finite", fix="use float32 or float64")
        back = beside[-1] if beside else 0.0
        following = {name: moved[name] - diagonal[-1] * q[name] - back * before[name] for name in q}
        before, q = q, following
        z = precondition(q)
        length = float(inner(q, z).clamp(min=0)) ** 0.5
        beside.append(length)
    found = eigvalsh_tridiagonal(diagonal, beside[: len(diagonal) - 1])
    size = sum(part[0].numel() for part in like.values())
    return Ends(float(found[-1]), float(found[0]), _bound(float(found[-1]), size, len(diagonal)), len(diagonal))


def _bound(largest: float, size: int, steps: int) -> float:
    """What the largest eigenvalue is below, but for `DOUBT`."""
    if steps >= size:
        return largest
    missed = (math.log(1.648 * size**0.5 / DOUBT) / (2 * steps - 1)) ** 2
    return largest / (1 - missed) if missed < 1 else math.inf

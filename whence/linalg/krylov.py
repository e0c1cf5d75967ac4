"""Conjugate gradients for symmetric positive definite operators, of many right-hand sides at once.

A block vector is `Q` vectors in named parts, `{name: [Q, ...]}`: gradients as they are, or one part `[Q, P]`. Operators and
preconditioners map blocks of any `Q` to blocks. `R` directions span what a step searches, `R <= Q`; the small matrices between
them are float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.errors import NumericalError

ROUNDING = 1e-3
"""Residual that is still taken for rounding where the recurrence has converged, and starting again gains nothing."""

Block = Mapping[str, Tensor]
Map = Callable[[dict[str, Tensor]], Block]
Basis = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]
"""`q`, `z` and the coefficients of what they are a basis of."""


@dataclass(frozen=True)
class Solution:
    """The solutions, and `|A x - b| / |b|` of each, `[Q]`, measured with one more product after `steps` steps.

    Where the products' rounding allows no more, it is above the tolerance, at most `ROUNDING`.
    """

    x: dict[str, Tensor]
    residual_Q: Tensor
    steps: int


def block_cg(
    operator: Map,
    b: Block,
    precondition: Map = dict,
    *,
    tolerance: float = 1e-6,
    iterations: int = 200,
    state: Mapping[str, Tensor] | None = None,
    after: Callable[[dict[str, Tensor], Tensor], None] = lambda state, residual_Q: None,
    coupled: Callable[[Tensor], Tensor] = lambda gram_RR: gram_RR,
) -> Solution:
    """Solve `A x_q = b_q` for all q in one block Krylov space, until each residual is at most `tolerance` of `|b_q|`.

    O'Leary (1980), with the residuals `r = c^T q` held as coefficients of a basis `q` that is orthonormal in the inner product
    of the preconditioner, as in BCGrQ of Dubrulle (2001): right-hand sides that nearly depend on each other drop out of it
    instead of breaking it. A step takes one product with `R` vectors. `precondition` is near `A^-1`, and symmetric positive
    definite.

    `after(state, residual_Q)` gets the state and the relative residuals after each step but the last; given that `state`, the
    search resumes to the same bits. Raises NumericalError where `iterations` are not enough, or where the operator or the
    preconditioner is not one symmetric positive definite matrix.
    """
    norm_Q = _norms(b)
    goal_Q, steps, reached = tolerance * norm_Q, 0, torch.inf
    x = {name: torch.zeros_like(part) for name, part in b.items()}
    if state is None:
        q, p, c_RQ = _start(b, precondition, coupled)
    else:
        x, q, p = ({name: state[f"{kind}/{name}"] for name in b} for kind in "xqp")
        c_RQ, steps = state["c"], int(state["steps"])
    while True:
        residual_Q = torch.zeros_like(norm_Q)
        while len(c_RQ) and steps < iterations:
            moved = operator(p)
            curvature, bad = torch.linalg.cholesky_ex(_symmetric(coupled(inner(p, moved))))
            if bad or not torch.isfinite(curvature).all():
                raise NumericalError(
                    "Conjugate gradients met a direction along which the operator is not finite, or does not curve upwards",
                    given=f"step {steps + 1}",
                    fix="use a larger damping, or a matrix that is never negative (Gauss-Newton or Fisher, not the Hessian)",
                )
            length_RR = torch.cholesky_inverse(curvature)
            x = _sum(x, combine((length_RR @ c_RQ).T, p))
            t = _sum(q, combine(-length_RR, moved))
            steps += 1
            residual_Q = (c_RQ * (inner(t, t) @ c_RQ)).sum(0).clamp(min=0).sqrt()
            if (residual_Q <= goal_Q).all():
                break
            q, z, s_RR = _orthonormal(t, precondition(t), coupled)
            p, c_RQ = _sum(z, combine(s_RR, p)), s_RR @ c_RQ
            kinds = {"x": x, "q": q, "p": p}
            parts = {f"{kind}/{name}": part for kind, block in kinds.items() for name, part in block.items()}
            after({**parts, "c": c_RQ, "steps": torch.tensor(steps)}, residual_Q / norm_Q.clamp(min=1e-300))
        left = _sum(b, combine(-torch.eye(len(norm_Q)), operator(x)))
        residual_Q = _norms(left)
        worst = float((residual_Q / norm_Q.clamp(min=1e-300)).max())
        stuck = not worst < reached / 2
        if worst <= (ROUNDING if stuck else tolerance):
            return Solution(x, residual_Q / norm_Q.clamp(min=1e-300), steps)
        if stuck or steps >= iterations:
            raise NumericalError(
                f"Conjugate gradients did not come down to a residual of {tolerance:g}",
                given=f"{worst:.1e} at worst after {steps} steps of at most {iterations}",
                fix="use a larger damping, more iterations, a better preconditioner, or float64",
            )
        reached = worst
        q, p, c_RQ = _start(left, precondition, coupled)


cg = functools.partial(block_cg, coupled=lambda gram_RR: gram_RR.diag().diag())
"""The same with each right-hand side searched along its own directions only (Hestenes & Stiefel 1952)."""


def inner(a: Block, b: Block) -> Tensor:
    """Inner products of every vector of `a` with every one of `b`, `[Q, Q]` in float64."""
    return torch.stack([(a[name].flatten(1) @ b[name].flatten(1).T).double() for name in a]).sum(0)


def combine(mix_RQ: Tensor, x: Block) -> dict[str, Tensor]:
    """`R` combinations of the vectors."""
    return {name: (mix_RQ.to(part) @ part.flatten(1)).view(-1, *part.shape[1:]) for name, part in x.items()}


def _sum(a: Block, b: Block) -> dict[str, Tensor]:
    return {name: part + b[name] for name, part in a.items()}


def _norms(a: Block) -> Tensor:
    return torch.stack([part.flatten(1).double().square().sum(1) for part in a.values()]).sum(0).sqrt()


def _symmetric(gram: Tensor) -> Tensor:
    return (gram + gram.T) / 2


def _start(r: Block, precondition: Map, coupled: Callable[[Tensor], Tensor]) -> Basis:
    """The basis of residuals, the first directions, and the residuals in the basis."""
    norm_Q = _norms(r)
    t = combine(torch.where(norm_Q > 0, 1 / norm_Q, 0.0).diag(), r)
    q, z, s_RQ = _orthonormal(t, precondition(t), coupled)
    return q, z, s_RQ * norm_Q


def _orthonormal(t: dict[str, Tensor], z: Block, coupled: Callable[[Tensor], Tensor]) -> Basis:
    """`q` and `z = M^-1 q` with `<q, z> = 1`, and `s` with `t = s^T q`; what of `t` is rounding is left out.

    Twice by the Gram matrix's eigenvectors, since the first time small eigenvalues are lost in the rounding of large ones; in
    between, each vector is scaled by its own norm.
    """
    least = torch.finfo(next(iter(t.values())).dtype).eps ** 0.5
    gram_RR = coupled(inner(t, z))
    if not torch.isfinite(gram_RR).all():
        raise NumericalError("A right-hand side, or what the preconditioner makes of it, is not finite")
    turn_RR = torch.linalg.eigh(_symmetric(gram_RR)).eigenvectors.T
    size_R = inner(combine(turn_RR, t), combine(turn_RR, z)).diag().clamp(min=0).sqrt()
    turn_RR, size_R = (part[size_R > least * size_R.norm()] for part in (turn_RR, size_R))
    mix_RR = turn_RR / size_R[:, None]
    value_R, vector_RR = torch.linalg.eigh(_symmetric(coupled(inner(combine(mix_RR, t), combine(mix_RR, z)))))
    s_RR = value_R.clamp(min=0).sqrt()[:, None] * vector_RR.T @ (size_R[:, None] * turn_RR)
    size_R = s_RR.norm(dim=1)
    enough_R = size_R > least * size_R.norm()
    mix_RR = vector_RR.T[enough_R] @ mix_RR / value_R[enough_R, None].sqrt()
    return combine(mix_RR, t), combine(mix_RR, z), s_RR[enough_R]

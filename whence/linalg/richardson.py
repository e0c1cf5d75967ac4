"""Linear systems solved by small steps along residuals, with a matrix of which each step sees another sample.

Block vectors are those of `whence.linalg.krylov`. With `M^-1` the preconditioner, `s` the scale and `A_t` the matrix of step t,

    x_{t+1} = x_t + M^-1 (b - A_t x_t) / s.

Without a preconditioner and from `x_0 = b / s` this is LiSSA (Agarwal et al. 2017; Koh & Liang 2017, section 3), whose
`h_t = s x_t` follows `h_{t+1} = b + h_t - A_t h_t / s`. Preconditioned by EK-FAC it is ASTRA (Wang et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.errors import NumericalError
from whence.linalg.krylov import Block, Map

DIVERGED = 1e4
"""Times the right-hand side and the first residual that a step's residual may be before the iterations are said to diverge."""

KINDS = ("x", "mean", "left", "total")
"""Of block vectors that are saved: the iterate, its mean, the watched residual, and the mean of the repeats so far."""

Sampled = Callable[[int, dict[str, Tensor]], Block]
"""`sampled(t, x)`: the product of the matrix of step t with the vectors."""


@dataclass(frozen=True)
class Iterated:
    """The solutions, and how many steps all repeats took together."""

    x: dict[str, Tensor]
    steps: int


def richardson(
    sampled: Sampled,
    b: Block,
    precondition: Map = dict,
    *,
    start: Block,
    scale: float,
    steps: int,
    repeats: int = 1,
    weight: float | None = None,
    window: int = 1,
    tolerance: float = 0.0,
    state: Mapping[str, Tensor] | None = None,
    after: Callable[[dict[str, Tensor], Tensor], None] = lambda state, residual_Q: None,
    advice: Callable[[], str] = lambda: "use a larger scale",
) -> Iterated:
    """Take `steps` steps from `start`, `repeats` times, and give the mean of what they come to, `{name: [Q, ...]}`.

    What one comes to is its last iterate, or with `weight` a mean that counts iterate t about as `t^weight`: 0 is the plain
    mean, more forgets the start sooner (Shamir & Zhang 2013, section 4). Means take away what the samples do to an iterate.

    The residual that is watched is the mean of `b - A_t x_t` over about the last `window` steps, as a share of `|b|`; one
    that is at most `tolerance` for all Q ends a repeat. `after(state, residual_Q)` gets it and the state after each step; given
    that `state`, the search resumes to the same bits. Raises NumericalError where a step's residual grows out of all bounds;
    `advice` says how that is mended.
    """
    x, mean = dict(start), _copy(start)
    left, total = ({name: torch.zeros_like(part) for name, part in b.items()} for _ in range(2))
    limit_Q: Tensor | None = None
    done, here, repeat = 0, 0, 0
    if state is not None:
        x, mean, left, total = ({name: state[f"{kind}/{name}"] for name in b} for kind in KINDS)
        limit_Q, (done, here, repeat) = state["limit"], (int(state[name]) for name in ("steps", "here", "repeat"))
    while repeat < repeats:
        moved = sampled(repeat * steps + here, x)
        now = {name: b[name] - moved[name] for name in b}
        now_Q = relative_norms(now, b)
        limit_Q = DIVERGED * now_Q.clamp(min=1) if limit_Q is None else limit_Q
        if not (now_Q <= limit_Q).all():
            raise NumericalError(
                "The iterations diverge: their steps are too long for this matrix",
                given=f"scale {scale:.3g}, a residual of {float(now_Q.max()):.1e} times the gradient at step {here + 1}",
                fix=advice(),
            )
        moved = precondition(now)
        x = {name: part + moved[name] / scale for name, part in x.items()}
        done, here = done + 1, here + 1
        mean = _towards(mean, x, 1.0 if weight is None else min(1.0, (weight + 1) / (here + weight)))
        left = _towards(left, now, 1 / min(here, window))
        residual_Q = relative_norms(left, b)
        if here == steps or (here >= window and (residual_Q <= tolerance).all()):
            total = _towards(total, mean, 1 / (repeat + 1))
            x, mean, here, repeat = dict(start), _copy(start), 0, repeat + 1
        blocks = zip(KINDS, (x, mean, left, total), strict=True)
        parts = {f"{kind}/{name}": part for kind, block in blocks for name, part in block.items()}
        counts = {"steps": done, "here": here, "repeat": repeat}
        after({**parts, "limit": limit_Q, **{name: torch.tensor(count) for name, count in counts.items()}}, residual_Q)
    return Iterated(total, done)


def relative_norms(a: Block, b: Block) -> Tensor:
    """`|a| / |b|` of each vector, `[Q]` in float64."""
    square_Q, of_Q = (torch.stack([part.flatten(1).double().square().sum(1) for part in x.values()]).sum(0) for x in (a, b))
    return torch.sqrt(square_Q / of_Q.clamp(min=1e-300))


def _towards(a: Block, b: Block, share: float) -> dict[str, Tensor]:
    return {name: part.lerp(b[name], share) for name, part in a.items()}


def _copy(a: Block) -> dict[str, Tensor]:
    return {name: part.clone() for name, part in a.items()}

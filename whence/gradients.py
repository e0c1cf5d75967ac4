"""Per-example gradients of a module's weight, kept factored as long as that is cheaper, and their inner products.

Letters: B examples in a batch, Q queries, R summands of a factored gradient (tokens when captured, rank after compression),
O outputs, I inputs (a bias is a further input that is always one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

import whence.cost as cost
from whence.precision import are_short

Per = Literal["example", "token", "module"]

CHUNK_BYTES = 256 * 2**20
"""Bound on the temporary memory of one contraction."""

CACHE_BYTES = 2**20
"""The same on a CPU for what is read once more as soon as it is made: about what stays in the cache of one core. Products in
short formats have too large a constant for that."""


@dataclass(frozen=True)
class Factored:
    """Gradients `sum_r g_r a_r^T` of `B` examples: output gradients `g_BRO` and inputs `a_BRI`."""

    g_BRO: Tensor
    a_BRI: Tensor
    positions_BR: Tensor | None = None
    """Where in the sequence each summand is from; None where they are all its positions in order."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, O, I)."""
        return (len(self), self.g_BRO.shape[-1], self.a_BRI.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """The format of both factors."""
        return self.g_BRO.dtype

    @property
    def device(self) -> torch.device:
        """Where both factors are."""
        return self.g_BRO.device

    def __len__(self) -> int:
        return len(self.g_BRO)

    def __getitem__(self, rows: slice) -> Factored:
        return Factored(self.g_BRO[rows], self.a_BRI[rows], None if self.positions_BR is None else self.positions_BR[rows])

    def dense(self) -> Dense:
        """The sum over R, formed."""
        return Dense(self.g_BRO.mT @ self.a_BRI)

    def to(self, *args: object) -> Factored:
        """As `Tensor.to`."""
        g_BRO, a_BRI = self.g_BRO.to(*args), self.a_BRI.to(*args)  # type: ignore[arg-type]
        same = g_BRO is self.g_BRO and a_BRI is self.a_BRI
        return self if same else Factored(g_BRO, a_BRI, self.positions_BR)


@dataclass(frozen=True)
class Dense:
    """Gradients `w_BOI` of `B` examples, one matrix each."""

    w_BOI: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, O, I)."""
        return (len(self), *self.w_BOI.shape[1:])  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The matrices' format."""
        return self.w_BOI.dtype

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return self.w_BOI.device

    def __len__(self) -> int:
        return len(self.w_BOI)

    def __getitem__(self, rows: slice) -> Dense:
        return Dense(self.w_BOI[rows])

    def dense(self) -> Dense:
        """Itself."""
        return self

    def to(self, *args: object) -> Dense:
        """As `Tensor.to`."""
        return Dense(self.w_BOI.to(*args))  # type: ignore[arg-type]


Gradient = Factored | Dense
Gradients = Mapping[str, Gradient]
AnyGradient = TypeVar("AnyGradient", bound=Gradient)


def dot(queries: Gradients, gradients: Gradients, per: Per = "example") -> Tensor:
    """Inner products of every query with every example, over the modules that both have.

    `per="example"` gives `[Q, B]`, `"token"` `[Q, B, R]` (every gradient must be factored with the same R),
    `"module"` `[M, Q, B]` in the order of `queries`. Tokens and modules add up to the example's product.
    """
    parts = [dot_module(queries[name], gradients[name], per) for name in queries if name in gradients]
    if per == "module":
        return torch.stack(parts)
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def dot_module(query: Gradient, gradient: Gradient, per: Per = "example") -> Tensor:
    """Inner products at one module: `[Q, B]`, or `[Q, B, R]` per token."""
    shape = gradient.shape[1:]
    if isinstance(gradient, Factored):
        rank, tokens = query.g_BRO.shape[1] if isinstance(query, Factored) else None, gradient.g_BRO.shape[1]
        way = cost.product_per_token if per == "token" else cost.product
        choice = way(len(query), rank, tokens, *shape)
        if per == "token" or choice.name == "tokens":
            parts = [_per_token(query, part) for part in chunks(gradient, math.ceil(choice.floats))]
            return torch.cat(parts if per == "token" else [part.sum(-1) for part in parts], dim=1)
    elif per == "token":
        raise TypeError("per-token products need a factored gradient; this module's gradient is not a sum over tokens")
    return torch.cat([_per_example(query, part.dense()) for part in chunks(gradient, math.prod(shape))], dim=1)


def _per_example(query: Gradient, gradient: Dense) -> Tensor:
    """`<query, w>`, `[Q, B]`."""
    if isinstance(query, Dense):
        w_QX, w_BX = query.w_BOI.flatten(1), gradient.w_BOI.flatten(1)
        return w_QX @ w_BX.T if len(w_QX) < len(w_BX) else (w_BX @ w_QX.T).T  # a CPU's products are faster the flat way
    rows_BOQR = torch.einsum("boi,qri->boqr", gradient.w_BOI, query.a_BRI)
    return torch.einsum("boqr,qro->qb", rows_BOQR, query.g_BRO)


def _per_token(query: Gradient, gradient: Factored) -> Tensor:
    """`<query, g_r a_r^T>`, `[Q, B, R]`, without forming the outer products."""
    g_BRO, a_BRI = gradient.g_BRO, gradient.a_BRI
    if isinstance(query, Factored):  # sum over the query's summands k of (g_r . g_k)(a_r . a_k)
        return (torch.einsum("bro,qko->qbrk", g_BRO, query.g_BRO) * torch.einsum("bri,qki->qbrk", a_BRI, query.a_BRI)).sum(-1)
    if g_BRO.shape[-1] <= a_BRI.shape[-1]:
        rotated_QBRO = torch.einsum("bri,qoi->qbro", a_BRI, query.w_BOI)
        return (rotated_QBRO * g_BRO).sum(-1)
    rotated_QBRI = torch.einsum("bro,qoi->qbri", g_BRO, query.w_BOI)
    return (rotated_QBRI * a_BRI).sum(-1)


def chunks(gradient: AnyGradient, floats_per_example: int, limit: int = CHUNK_BYTES) -> list[AnyGradient]:
    """Split the examples so that work with so many temporary numbers per example stays below `limit` bytes."""
    step = max(1, limit // (4 * max(1, floats_per_example)))
    return [cast(AnyGradient, gradient[start : start + step]) for start in range(0, len(gradient), step)]


def cached_chunks(gradient: AnyGradient) -> list[AnyGradient]:
    """Split the examples so that their matrices `[O, I]`, once formed, are still in a CPU's cache for what comes next.

    Elsewhere so that three matrices of each, as a rotation and a square hold, stay below `CHUNK_BYTES`.
    """
    size = math.prod(gradient.shape[1:])
    if gradient.device.type == "cpu" and not are_short():
        return chunks(gradient, size, CACHE_BYTES)
    return chunks(gradient, 3 * size)

"""Sparse projections of each module's gradient: masks of inputs and outputs, and sums of all numbers with random signs.

sparse_projections(shapes, 1024, seed)                                                   SJLT of the whole gradient
sparse_projections(masked.sizes, 1024, seed) @ masked, masked = masks(shapes, 128, seed)     FactGraSS
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from whence.errors import UsageError
from whence.gradients import Dense, Factored, Gradient, Gradients, chunks
from whence.linalg.project import Sparse, mask, sparse_projection
from whence.operators.base import Operator, Streaming
from whence.operators.projection import Shapes


class ByModule(Operator):
    """An operator that is given by what it does at each module."""

    @property
    def blockwise(self) -> bool:
        """It is."""
        return True

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Apply it at each of its modules."""
        return {name: self.at(name, gradients[name]) for name in self.names if name in gradients}

    def streaming(self, like: Tensor | None = None) -> Streaming:
        """Itself, module by module."""
        return _StreamingByModule(self if like is None else self.to(like), like)

    @abc.abstractmethod
    def at(self, name: str, gradient: Gradient) -> Gradient:
        """The map at one module."""

    @abc.abstractmethod
    def to(self, like: Tensor) -> Self:
        """The same in the dtype and on the device of `like`."""


class _StreamingByModule(Streaming):
    def __init__(self, operator: ByModule, like: Tensor | None):
        self.operator, self.dtype = operator, None if like is None else like.dtype

    def apply(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Gradient:
        return self.operator.at(name, gradient if self.dtype is None else gradient.to(self.dtype))


@dataclass(frozen=True)
class Masks(ByModule):
    """Some outputs `[P_O]` and inputs `[P_I]` of each module of these `shapes`, scaled so that inner products keep their mean.

    Gradients stay factored: the numbers that are left out are never formed (FactGraSS: Hu et al. 2025, section 3).
    """

    shapes: Shapes
    out: Mapping[str, Tensor]
    into: Mapping[str, Tensor]
    label: str = "masks"

    @property
    def names(self) -> tuple[str, ...]:
        """The modules it acts on."""
        return tuple(self.out)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs that are left of each module."""
        return {name: (len(self.out[name]), len(self.into[name])) for name in self.out}

    def at(self, name: str, gradient: Gradient) -> Gradient:
        """Take some outputs and inputs of the gradients."""
        out, into, (n_out, n_in) = self.out[name], self.into[name], self.shapes[name]
        scale = (n_out * n_in / (len(out) * len(into))) ** 0.5
        if isinstance(gradient, Factored):
            return replace(gradient, g_BRO=gradient.g_BRO[..., out] * scale, a_BRI=gradient.a_BRI[..., into])
        return Dense(gradient.w_BOI[:, out][..., into] * scale)

    def identity(self) -> Any:
        """Which of them."""
        return {name: [self.out[name], self.into[name]] for name in self.out}

    def to(self, like: Tensor) -> Masks:
        """The same on the device of `like`."""
        out, into = ({n: places.to(like.device) for n, places in side.items()} for side in (self.out, self.into))
        return Masks(self.shapes, out, into, self.label)


@dataclass(frozen=True)
class SparseProjection(ByModule):
    """A sparse Johnson-Lindenstrauss transform of each module's whole gradient: `[O, I]` becomes `[1, P]`."""

    sparse: Mapping[str, Sparse]
    label: str = "sparse projection"

    @property
    def names(self) -> tuple[str, ...]:
        """The modules it acts on."""
        return tuple(self.sparse)

    def at(self, name: str, gradient: Gradient) -> Dense:
        """Form the gradients, some at a time, and project them."""
        parts = chunks(gradient, 3 * gradient.shape[1] * gradient.shape[2]) or [gradient]
        rows = torch.cat([self.sparse[name](part.dense().w_BOI.flatten(1)) for part in parts])
        return Dense(rows.unsqueeze(1))

    def identity(self) -> Any:
        """The places and signs of all entries."""
        return {name: [sparse.order_SK, sparse.signs_SK, sparse.dim] for name, sparse in self.sparse.items()}

    def to(self, like: Tensor) -> SparseProjection:
        """The same on the device of `like`."""
        return SparseProjection({name: sparse.to(like) for name, sparse in self.sparse.items()}, self.label)


def masks(shapes: Shapes, dim: int, seed: int) -> Masks:
    """At most `dim` outputs and inputs of each module, drawn with the seed."""
    out, into = ({n: mask(shape[side], dim, f"{seed}:{side}:{n}") for n, shape in shapes.items()} for side in (0, 1))
    return Masks(shapes, out, into)


def sparse_projections(shapes: Shapes, dim: int, seed: int, nonzeros: int = 1) -> SparseProjection:
    """One of each module's numbers to `dim`, drawn with the seed. Raises UsageError where `nonzeros` don't divide `dim`."""
    if dim % nonzeros:
        raise UsageError(
            "The sums of a sparse projection can't be dealt out evenly.",
            given=f"{dim} sums, of which each number goes into {nonzeros}",
            accepted=f"nonzeros that divide {dim}",
        )
    return SparseProjection({n: sparse_projection(o * i, dim, f"{seed}:{n}", nonzeros) for n, (o, i) in shapes.items()})

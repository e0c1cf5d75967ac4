"""Two-sided projections of each module's gradient, an operator into a smaller space: for rows of an index and their queries."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whence.gradients import Dense, Factored, Gradient, Gradients
from whence.linalg.project import kronecker_scales, projection
from whence.linalg.rotation import Rotation
from whence.operators.base import Operator, Streaming
from whence.operators.eigen import BlockDiagonal, EigenBlock

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Projection(Operator):
    """A matrix for each side of each module, `m_O [O, P]` and `m_I [I, P]`: a gradient becomes `m_O^T w m_I`, `[P, P]`."""

    out: Mapping[str, Tensor]
    into: Mapping[str, Tensor]
    """Modules that may read the same input have the same tensor here, so that it is projected once."""
    label: str = "projection"

    @property
    def names(self) -> tuple[str, ...]:
        """The modules it acts on."""
        return tuple(self.out)

    @property
    def blockwise(self) -> bool:
        """It is."""
        return True

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Project each module's gradients."""
        return {n: Dense(project(gradients[n], self.out[n], self.into[n])) for n in self.out if n in gradients}

    def identity(self) -> Any:
        """Both sides' matrices."""
        return {name: [self.out[name], self.into[name]] for name in self.out}

    def streaming(self, like: Tensor | None = None) -> StreamingProjection:
        """Itself, module by module."""
        return StreamingProjection(self if like is None else self.to(like))

    @property
    def widths(self) -> list[int]:
        """Numbers that each module has in a row."""
        return [self.out[name].shape[1] * self.into[name].shape[1] for name in self.out]

    @property
    def places(self) -> dict[str, slice]:
        """Where each module's numbers are in a row."""
        stops = list(itertools.accumulate(self.widths))
        return {name: slice(stop - width, stop) for name, width, stop in zip(self.out, self.widths, stops, strict=True)}

    def to(self, like: Tensor) -> Projection:
        """The same in the dtype and on the device of `like`; what was shared stays shared."""
        every = (*self.out.values(), *self.into.values())
        if all(m.dtype == like.dtype and m.device == like.device for m in every):
            return self
        moved = {id(m): m.to(like) for m in every}
        return Projection({n: moved[id(m)] for n, m in self.out.items()}, {n: moved[id(m)] for n, m in self.into.items()})


class StreamingProjection(Streaming):
    """A projection that meets the modules' gradients one by one, and their inputs on the way forward if asked to."""

    def __init__(self, projection: Projection):
        self.projection = projection
        self._ahead: Mapping[str, Tensor] = {}

    def ahead(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        self._ahead = {name: self.projection.into[name] for name in names}
        return self._ahead

    def apply(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Dense:
        m_O, m_I = self.projection.out[name], self.projection.into[name]
        gradient = gradient if gradient.dtype == m_O.dtype else gradient.to(m_O.dtype)
        read_BRP = gradient.a_BRI if name in self._ahead and isinstance(gradient, Factored) else None
        return Dense(project(gradient, m_O, m_I, read_BRP))


def random_projection(shapes: Shapes, dim: int, seed: int) -> Projection:
    """Random signs; the outputs of every module have their own, the inputs of one parent's modules share theirs."""
    out = {name: projection(n_out, dim, f"{seed}:out:{name}") for name, (n_out, _) in shapes.items()}
    families = {(_family(name), n_in) for name, (_, n_in) in shapes.items()}
    shared = {(family, n_in): projection(n_in, dim, f"{seed}:in:{family}") for family, n_in in families}
    return Projection(out, {name: shared[_family(name), n_in] for name, (_, n_in) in shapes.items()})


def in_eigenbasis(random: Projection, inverse: BlockDiagonal) -> tuple[Projection, Projection]:
    """Projections of training examples and of queries in the basis of an operator `Q diag(lam) Q^T`, whitened by it.

    With scales `s_O s_I` close to `lam`, examples are projected as `R^T (s^1/2 Q^T g)` and queries as `R^T (s^-1/2 Q^T
    v)`: the scales cancel, so the mean of the inner product is `<g, v>` whatever they are, and its variance is that of
    whitened gradients where `v = operator @ query`. The scales factorise, so this costs as much as projecting alone.
    """

    def whitened(power: float) -> Projection:
        out, into = {}, {}
        for name, r_O in random.out.items():
            block = inverse.blocks[name]
            s_O, s_I = kronecker_scales(block.lam_OI.double())
            out[name] = _rotated(block.q_O, s_O**power, r_O)
            into[name] = _rotated(block.q_I, s_I**power, random.into[name])
        return Projection(out, into)

    return whitened(0.5), whitened(-0.5)


def leading_eigenvectors(blocks: Mapping[str, EigenBlock], dim: int) -> Projection:
    """The `dim` directions of each side in which a curvature's eigenvalues are largest, added up over the other side.

    With K-FAC these are principal components of inputs and of output gradients (LoGra: Choe et al. 2024, section 3.1).
    """

    def directions(q: Rotation | None, lam: Tensor) -> Tensor:
        largest = lam.topk(min(dim, len(lam))).indices.sort().values
        return (q.dense() if q else torch.eye(len(lam)).to(lam))[:, largest]

    out = {name: directions(block.q_O, block.lam_OI.sum(1)) for name, block in blocks.items()}
    into = {name: directions(block.q_I, block.lam_OI.sum(0)) for name, block in blocks.items()}
    return Projection(out, into, "leading eigenvectors")


def project(gradient: Gradient, m_O: Tensor, m_I: Tensor, read_BRP: Tensor | None = None) -> Tensor:
    """`m_O^T w m_I` of each example, `[B, P, P]`, in float32 or better; `read_BRP` is `a m_I` where it is known."""
    if isinstance(gradient, Factored):
        read_BRP = gradient.a_BRI @ m_I if read_BRP is None else read_BRP
        return torch.bmm(_summable(gradient.g_BRO @ m_O).mT, _summable(read_BRP))  # `@` takes longer to find it
    return _summable(m_O.T @ gradient.w_BOI @ m_I)


def _summable(numbers: Tensor) -> Tensor:
    """The numbers in float32, or as they are where that is no shorter."""
    return numbers if numbers.dtype.itemsize >= 4 else numbers.float()


def _family(name: str) -> str:
    """The modules of one parent may read one input (q/k/v, gate/up); those of a numbered list hardly do."""
    parent, _, own = name.rpartition(".")
    return name if own.isdigit() or not parent else parent


def _rotated(q: Rotation | None, scale: Tensor, r: Tensor) -> Tensor:
    """`Q diag(scale) R`, with which `x` becomes `R^T diag(scale) Q^T x`."""
    scaled = scale.unsqueeze(-1) * r.to(scale)
    return (q.to(scaled).unrotate(scaled.T).T if q else scaled).float()

"""Operators that are diagonal in a Kronecker-factored basis.

One block `(Q_O kron Q_I) diag(lambda_OI) (Q_O kron Q_I)^T` per module is identity, diagonal, K-FAC (Martens & Grosse
2015), EK-FAC (George et al. 2018) and eigenvalue-corrected Shampoo (Gupta et al. 2018), by what its bases and its
eigenvalues are. A function of the operator is the function of its eigenvalues.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from whence.cost import rotation
from whence.errors import NumericalError
from whence.gradients import Dense, Factored, Gradient, Gradients, cached_chunks
from whence.linalg.rotation import Rotation
from whence.operators.base import Operator, Streaming
from whence.progress import note
from whence.settings import valid_damping
from whence.show.numbers import size

SHARE = 0.5
"""Of a GPU's free memory that factors may take; gradients and a batch need the rest."""

SIDES = 3
"""Sides that stay on a GPU that has no room for all: of an input that several modules read, and of two outputs."""


@dataclass(frozen=True)
class EigenBlock:
    """Eigenvalues `lam_OI` in the basis `q_O` x `q_I` of a module's weight matrix; None stands for the identity basis."""

    q_O: Rotation | None
    q_I: Rotation | None
    lam_OI: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """What it is kept as."""
        return [self.lam_OI, *(part for side in (self.q_O, self.q_I) if side for part in side.blocks)]

    def __matmul__(self, gradient: Gradient) -> Dense:
        return Dense(self.unrotate(self.rotate(gradient).w_BOI * self.lam_OI))

    def rotate(self, gradient: Gradient) -> Dense:
        """Coordinates of the gradients in the eigenbasis, `Q_O^T w Q_I`, `[B, O, I]`, in the cheapest order of products."""
        left, gradient = self.ahead(gradient)
        w_BOI = gradient.dense().w_BOI
        if left.q_O:
            w_BOI = left.q_O.rotate_rows(w_BOI)
        if left.q_I:
            w_BOI = left.q_I.rotate(w_BOI)
        return Dense(w_BOI)

    def ahead(self, gradient: Gradient) -> tuple[EigenBlock, Gradient]:
        """The gradients with those sides in the eigenbasis that are cheaper to rotate summand by summand.

        The block that comes with them has no basis on these sides: what is left is to rotate the sums.
        """
        order = self.order(gradient)
        if not isinstance(gradient, Factored) or not order:
            return self, gradient
        left = self
        if self.q_O and "out first" in order:
            left, gradient = replace(left, q_O=None), replace(gradient, g_BRO=self.q_O.rotate(gradient.g_BRO))
        if self.q_I and "in first" in order:
            left, gradient = replace(left, q_I=None), replace(gradient, a_BRI=self.q_I.rotate(gradient.a_BRI))
        return left, gradient

    def order(self, gradient: Gradient, shared: int = 1) -> str:
        """Which sides are rotated before the summands are added up, where `shared` sites read the same input."""
        if not isinstance(gradient, Factored):
            return ""
        _, n_out, n_in = gradient.shape
        return rotation(gradient.g_BRO.shape[1], n_out, n_in, self.q_O is not None, self.q_I is not None, shared).name

    def unrotate(self, w_BOI: Tensor) -> Tensor:
        """Back from the eigenbasis, `Q_O w Q_I^T`."""
        if self.q_O:
            w_BOI = self.q_O.unrotate_rows(w_BOI)
        return self.q_I.unrotate(w_BOI) if self.q_I else w_BOI

    def quadratic(self, gradient: Gradient) -> Tensor:
        """`<w, block w>` of each example, `[B]`: one rotation, none back."""
        return self.rotate(gradient).w_BOI.square().flatten(1) @ self.lam_OI.flatten()

    def diagonal_of(self, weights_OI: Tensor) -> Tensor:
        """Diagonal, in the block's basis, of the matrix that multiplies each weight by its own number: `[O, I]`."""
        found = weights_OI.to(self.lam_OI)
        if self.q_O:
            found = self.q_O.dense().square().T @ found
        return found @ self.q_I.dense().square() if self.q_I else found

    def dense(self) -> Tensor:
        """The block as a matrix `[O*I, O*I]`, row-major in (O, I)."""
        n_out, n_in = self.lam_OI.shape
        q_O = self.q_O.dense() if self.q_O else torch.eye(n_out).to(self.lam_OI)
        q_I = self.q_I.dense() if self.q_I else torch.eye(n_in).to(self.lam_OI)
        q = torch.kron(q_O, q_I)
        return (q * self.lam_OI.flatten()) @ q.T


class SharedInputs:
    """Inputs in the eigenbasis, made once for the sites that read the same tensor in the same basis."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, ...], tuple[weakref.ref[Tensor], Rotation, Tensor, int]] = {}

    def rotate(self, block: EigenBlock, gradient: Gradient, readers: tuple[str, ...]) -> tuple[EigenBlock, Gradient]:
        """The block and the gradient as they are, or both with the input side in the eigenbasis where that pays.

        Then the block's `q_I` is None: what is left to rotate is the output side. The last of the `readers` to come takes
        the rotated input along.
        """
        if len(readers) == 1 or block.q_I is None or not isinstance(gradient, Factored):
            return block, gradient
        source, basis, a_BRI, left = self._made.pop(readers, (None, None, gradient.a_BRI, 0))
        if source is None or source() is not gradient.a_BRI or basis is not block.q_I:
            if "in first" not in block.order(gradient, len(readers)):
                return block, gradient
            source, a_BRI, left = weakref.ref(gradient.a_BRI), block.q_I.rotate(gradient.a_BRI.to(block.lam_OI)), len(readers)
        if left > 1:
            self._made[readers] = (source, block.q_I, a_BRI, left - 1)
        return replace(block, q_I=None), replace(gradient, a_BRI=a_BRI)


class _StreamingBlocks(Streaming):
    """One block per module; rotations of shared inputs are shared."""

    def __init__(self, blocks: Mapping[str, EigenBlock]):
        self.blocks, self.inputs = blocks, SharedInputs()

    def apply(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Dense:
        whole = self.blocks[name]
        block, gradient = self._prepared(whole, gradient, readers)
        return Dense(whole.unrotate(block.rotate(gradient).w_BOI * block.lam_OI))

    def quadratic(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Tensor:
        block, gradient = self._prepared(self.blocks[name], gradient, readers)
        left, gradient = block.ahead(gradient)
        return torch.cat([left.quadratic(part) for part in cached_chunks(gradient)])

    def _prepared(self, block: EigenBlock, gradient: Gradient, readers: tuple[str, ...]) -> tuple[EigenBlock, Gradient]:
        block, gradient = self.inputs.rotate(block, gradient, readers)
        return block, gradient.to(block.lam_OI.dtype)


@dataclass(frozen=True)
class BlockDiagonal(Operator):
    """One EigenBlock per module; modules don't interact."""

    blocks: Mapping[str, EigenBlock]
    label: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The modules it acts on."""
        return tuple(self.blocks)

    @property
    def blockwise(self) -> bool:
        """It is."""
        return True

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Apply each module's block; modules without one are left out."""
        return {name: block @ gradients[name] for name, block in self.blocks.items() if name in gradients}

    def streaming(self, like: Tensor | None = None) -> Streaming:
        """Itself, for gradients that arrive module by module; inputs that several modules read are rotated once."""
        return _StreamingBlocks(self.blocks if like is None else _placed(self.blocks, like))

    def dense(self) -> dict[str, Tensor]:
        """Each block as a matrix."""
        return {name: block.dense() for name, block in self.blocks.items()}

    def apply(self, function: Callable[[Tensor], Tensor], label: str = "a function") -> BlockDiagonal:
        """The same function of every block: `function` maps its eigenvalues `[O, I]`."""
        blocks = {name: replace(block, lam_OI=function(block.lam_OI)) for name, block in self.blocks.items()}
        return BlockDiagonal(blocks, f"{self.label}, {label}")

    def plus(self, diagonal: BlockDiagonal) -> BlockDiagonal:
        """Itself and what multiplies each weight by its own number, added up as well as its own bases allow.

        The eigenvalues are those that come nearest to the sum in these bases (George et al. 2018, theorem 2): what the second
        has off the diagonal there is left out, which is nothing where it is a multiple of the identity.
        """
        added = {name: block.diagonal_of(diagonal.blocks[name].lam_OI) for name, block in self.blocks.items()}
        blocks = {name: replace(block, lam_OI=block.lam_OI + added[name]) for name, block in self.blocks.items()}
        return BlockDiagonal(blocks, f"{self.label}, plus {diagonal.label}")

    def inverse(self, damping: float = 0.1, *, absolute: float | None = None) -> BlockDiagonal:
        """`(block + lambda)^-1`, lambda being `damping` times the module's mean eigenvalue, or `absolute` everywhere.

        The relative form with 0.1 is the heuristic of Grosse et al. 2023, section 3.1. Raises UsageError for a damping
        below zero, NumericalError where an eigenvalue and its damping are both zero.
        """
        damping, absolute = valid_damping(damping, absolute)
        inverted = {}
        for name, block in self.blocks.items():
            damped = block.lam_OI + (damping * block.lam_OI.mean() if absolute is None else absolute)
            if not bool((damped > 0).all()):
                raise NumericalError(
                    f"The curvature of {name} can't be inverted",
                    given=f"{int((damped <= 0).sum())} eigenvalues of 0, damping {damping if absolute is None else absolute}",
                    fix="use a damping above zero (absolute=1e-8 where a module has no curvature at all)",
                )
            inverted[name] = replace(block, lam_OI=damped.reciprocal())
        how = f"damping {damping:g} x mean eigenvalue" if absolute is None else f"damping {absolute:g}"
        return BlockDiagonal(inverted, f"{self.label}, inverse with {how}")

    def quadratic(self, gradients: Gradients) -> Tensor:
        """`<g, operator g>` of each example, `[B]`."""
        return torch.stack([block.quadratic(gradients[name]) for name, block in self.blocks.items() if name in gradients]).sum(
            0
        )

    def identity(self) -> Any:
        """The eigenvalues: they change with whatever the operator was fitted on."""
        return {name: block.lam_OI for name, block in self.blocks.items()}

    def to(self, like: Tensor) -> BlockDiagonal:
        """The same in the dtype and on the device of `like`; bases that blocks share stay shared."""
        return BlockDiagonal(blocks_to(self.blocks, like), self.label)


def _placed(blocks: Mapping[str, EigenBlock], like: Tensor) -> Mapping[str, EigenBlock]:
    """The blocks in the dtype and on the device of `like`: at once if they fit, else one after the other."""
    away = {id(x): x for block in blocks.values() for x in block.tensors if x.device.type != like.device.type}
    taken = sum(x.numel() for x in away.values()) * like.itemsize
    if taken <= SHARE * free_bytes(like.device):
        return blocks_to(blocks, like)
    note(f"factors of {size(taken)} are more than the GPU has room for: they visit it module by module")
    return _Visiting(blocks, like)


def free_bytes(device: torch.device) -> float:
    """Memory of the device that is free; unbounded for a CPU, where what has been loaded needs no further room."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


class _Visiting(Mapping[str, EigenBlock]):
    """Blocks that are moved when they are asked for; the sides moved last stay, for the modules that share them."""

    def __init__(self, blocks: Mapping[str, EigenBlock], like: Tensor):
        self._blocks, self._like = blocks, like
        self._here: dict[int, Rotation] = {}

    def __getitem__(self, name: str) -> EigenBlock:
        block = self._blocks[name]
        return EigenBlock(self._moved(block.q_O), self._moved(block.q_I), block.lam_OI.to(self._like))

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def _moved(self, side: Rotation | None) -> Rotation | None:
        if side is None:
            return None
        moved = self._here.pop(id(side), None) or side.to(self._like)
        self._here[id(side)] = moved
        while len(self._here) > SIDES:
            del self._here[next(iter(self._here))]
        return moved


def blocks_to(blocks: Mapping[str, EigenBlock], like: Tensor) -> dict[str, EigenBlock]:
    """The blocks in the dtype and on the device of `like`; bases that they share stay shared."""
    sides = {id(q): q for block in blocks.values() for q in (block.q_O, block.q_I) if q}
    moved = {key: q.to(like) for key, q in sides.items()}
    return {
        name: EigenBlock(
            moved[id(block.q_O)] if block.q_O else None,
            moved[id(block.q_I)] if block.q_I else None,
            block.lam_OI.to(like),
        )
        for name, block in blocks.items()
    }

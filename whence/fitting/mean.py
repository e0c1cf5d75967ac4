"""The mean of several curvatures of the same modules, such as those of a stretch of training, in bases of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whence.fitting.curvature import Curvature
from whence.linalg.eigh import eigh
from whence.linalg.rotation import Rotation
from whence.operators import BlockDiagonal, EigenBlock


def mean_curvature(curvatures: Sequence[Curvature]) -> BlockDiagonal:
    """Mean of the blocks, as well as the eigenbases of the mean covariances allow (Bae et al. 2024).

    The eigenvalues are the diagonal of the mean block in these bases: the nearest there are. Of one curvature this is its own
    operator. Modules that one of them lacks are left out.
    """
    first = curvatures[0].operator
    assert isinstance(first, BlockDiagonal), "the identity has no mean"
    if len(curvatures) == 1:
        return first
    known: dict[tuple[int, ...], Rotation | None] = {}

    def basis(rotations: Sequence[Rotation | None], values: Sequence[Tensor], name: str) -> Rotation | None:
        key = tuple(map(id, rotations))  # modules that read the same input share it
        if key not in known:
            known[key] = _mean_basis([q for q in rotations if q], values, name)
        return known[key]

    blocks: dict[str, EigenBlock] = {}
    for name in first.names:
        if all(name in curvature.blocks for curvature in curvatures):
            own, sides = [each.blocks[name] for each in curvatures], [each.sides.get(name) for each in curvatures]
            q_O = basis([block.q_O for block in own], [side.out_O for side in sides if side], f"the output gradients of {name}")
            q_I = basis([block.q_I for block in own], [side.in_I for side in sides if side], f"the inputs of {name}")
            lam_OI = torch.stack([_diagonal_in(block, q_O, q_I) for block in own]).mean(0)
            blocks[name] = EigenBlock(q_O, q_I, lam_OI)
    return BlockDiagonal(blocks, f"mean of {len(curvatures)} x {first.label}")


def _mean_basis(rotations: Sequence[Rotation], values: Sequence[Tensor], name: str) -> Rotation | None:
    """Eigenvectors of the mean of `Q diag(values) Q^T`, diagonal block by diagonal block; none where there are no `Q`."""
    if not rotations:
        return None
    vectors, start = [], 0
    for parts in zip(*(q.blocks for q in rotations), strict=True):
        span = slice(start, start + len(parts[0]))
        total = sum(((q * v[span]) @ q.T for q, v in zip(parts, values, strict=True)), torch.zeros_like(parts[0]))
        vectors.append(eigh(total / len(parts), name)[1].to(parts[0]))
        start = span.stop
    return Rotation(tuple(vectors))


def _diagonal_in(block: EigenBlock, q_O: Rotation | None, q_I: Rotation | None) -> Tensor:
    """Diagonal of the block in other bases, `[O, I]`."""

    def between(old: Rotation | None, new: Rotation | None) -> Rotation | None:
        if old is None or new is None:
            return None
        return Rotation(tuple(a.T @ b for a, b in zip(old.blocks, new.blocks, strict=True)))

    return EigenBlock(between(block.q_O, q_O), between(block.q_I, q_I), block.lam_OI).diagonal_of(block.lam_OI)

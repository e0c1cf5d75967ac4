"""Landmark questions: rows are measured along them, and a new question is written as a sum of them.

In the coordinates `x = lam^1/2 Q^T g` an operator `Q diag(lam) Q^T` is a plain inner product. With `J` landmarks `L [J, P]`
of length one, rows are coded as `a = L x`, and a question `y` meets them as `(L y) (L L^T + e)^-1 a`, which is its influence as
far as the landmarks span it (Nystroem: Williams & Seeger 2001). What they leave of rows and questions is projected to a few
thousand numbers (Kane & Nelson 2014), of which rows keep the signs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from whence.coverage import Site
from whence.engine.partition import keep
from whence.engine.point import Point
from whence.engine.queries import Queries, precondition
from whence.gradients import CHUNK_BYTES, Dense, Factored, Gradient, Gradients, chunks, dot, dot_module
from whence.linalg.project import Sparse, dealt
from whence.operators import BlockDiagonal
from whence.operators.sketch import ByModule
from whence.progress import note
from whence.store.manifest import Folder
from whence.store.memory import Memory

RIDGE = 0.01
"""`e`: recall is the same from 0.001 to 0.1."""

BYTES = 2**30
"""Up to which rank="auto" keeps the landmarks' gradients whole, and those of the questions held out. Else the landmarks have
the largest rank that takes no more, and the questions held out `HELD_OUT_RANK`."""

HELD_OUT_RANK = 16
"""What an index says of the best 10 rows is then within .011 of what it says with whole gradients, half the standard error that
16 questions leave; at rank 8 within .018, at rank 4 .025 (`benchmarks.few_rows --stories 1000`). At rank 32 rows would take as
long with them as with 512 landmarks at rank 1."""

HELD_OUT_BYTES = 2**32
"""If questions take more at that rank, fewer are held out."""

KEPT, HELD_OUT_KEPT = torch.bfloat16, torch.float32
"""Formats of the gradients. Rows and questions meet the same rounded landmarks, so that nothing of it is seen in their
products; questions held out say what exact scores are."""

AT_A_TIME = 64
"""Questions whose whole gradients are held, of large modules fewer."""

LANDMARKS = "landmarks"


@dataclass(frozen=True)
class Whitened(ByModule):
    """Gradients in the coordinates of an operator, `lam^1/2 Q^T g`: their inner products are those by the operator."""

    inverse: BlockDiagonal
    label: str = "whitened"

    @property
    def names(self) -> tuple[str, ...]:
        """The modules it acts on."""
        return tuple(self.inverse.blocks)

    def at(self, name: str, gradient: Gradient) -> Dense:
        """Rotate and scale them."""
        block = self.inverse.blocks[name]
        return Dense(block.rotate(gradient).w_BOI * block.lam_OI.sqrt())

    def identity(self) -> object:
        """That of the operator."""
        return self.inverse.identity()

    def to(self, like: Tensor) -> Whitened:
        """The same in the dtype and on the device of `like`."""
        return Whitened(self.inverse.to(like))


@dataclass(frozen=True)
class Directions:
    """Whitened gradients of landmarks, `[J]` in bfloat16, and those of some more questions, held out to measure recall with."""

    landmarks: Gradients
    held_out: Gradients
    """`[H]` in float32."""
    signs: int
    """Numbers that the rest is projected to."""
    seed: int
    deal: Callable[[int, int, str], Sparse] = dealt
    """Makes what projects a module's part."""

    def __len__(self) -> int:
        return len(next(iter(self.landmarks.values())))

    @functools.cached_property
    def single(self) -> Gradients:
        """The landmarks in float32."""
        return {name: gradient.to(torch.float32) for name, gradient in self.landmarks.items()}

    @functools.cached_property
    def sparse(self) -> dict[str, Sparse]:
        """What projects each module's part; the parts are added up."""
        shapes = {name: gradient.shape[1:] for name, gradient in self.landmarks.items()}
        return {name: self.deal(n_out * n_in, self.signs, f"{self.seed}:{name}") for name, (n_out, n_in) in shapes.items()}

    @functools.cached_property
    def sketched(self) -> Tensor:
        """The landmarks, projected, `[J, K]`."""
        return self.sketch(self.single)

    def sketch(self, gradients: Gradients) -> Tensor:
        """Project gradients, `[B, K]`."""
        found: Tensor | None = None
        for name, gradient in gradients.items():
            parts = chunks(gradient, max(math.prod(gradient.shape[1:]), CHUNK_BYTES // 4 // AT_A_TIME))
            part = torch.cat([self.sketch_module(name, part.dense().w_BOI.flatten(1)) for part in parts])
            found = part if found is None else found + part
        assert found is not None
        return found

    def sketch_module(self, name: str, x_BP: Tensor) -> Tensor:
        """Project one module's part, `[B, K]`."""
        sparse = self.sparse[name].to(x_BP)
        return sparse(F.pad(x_BP, (0, sparse.order_SK.shape[1] - x_BP.shape[1])))

    @functools.cached_property
    def gram(self) -> Tensor:
        """The landmarks' influence on one another, `[J, J]` in float64."""
        return torch.stack([dot_module(gradient, gradient).double() for gradient in self.single.values()]).sum(0)

    @functools.cached_property
    def scale_J(self) -> Tensor:
        """What brings the landmarks to length one."""
        return self.gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()

    @functools.cached_property
    def inverse_JJ(self) -> Tensor:
        """Of the damped Gram matrix of landmarks of length one."""
        k_JJ = self.gram * self.scale_J * self.scale_J.unsqueeze(1)
        damped = (k_JJ + k_JJ.T) / 2 + RIDGE * torch.eye(len(self), dtype=torch.float64)
        return torch.linalg.inv(damped)

    def rest(self, k_BJ: Tensor, sketch_BK: Tensor) -> tuple[Tensor, Tensor]:
        """How vectors are written in landmarks of length one, `[B, J]`, and the projection of what is left of them, `[B, K]`.

        Given are their products with landmarks of length one, and the projection of all of them.
        """
        weights_BJ = k_BJ.double() @ self.inverse_JJ.to(k_BJ.device)
        return weights_BJ, sketch_BK - (weights_BJ * self.scale_J.to(k_BJ.device)).to(sketch_BK) @ self.sketched.to(sketch_BK)

    def coded(self, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """What the codes of rows are multiplied with for questions of these whitened gradients: `[Q, J]` and `[Q, K]`."""
        k_QJ = dot(gradients, {name: self.single[name].to(gradients[name].dtype) for name in gradients}) * self.scale_J
        weights_QJ, rest_QK = self.rest(k_QJ, self.sketch(gradients))
        return weights_QJ.float(), rest_QK.float()


def make_directions(
    folder: Folder | Memory,
    point: Point,
    sites: Mapping[str, Site],
    asked: Queries,
    landmarks: int,
    held_out: int,
    operator: BlockDiagonal,
    signs: int,
    rank: int | str,
    seed: int,
) -> Directions:
    """Measure the gradients of the first questions, and of the last, held out; what a killed build has kept is taken."""
    if not folder.has(LANDMARKS):
        parts: dict[str, Tensor] = {}
        for kind, some, low, dtype in (
            ("landmark", slice(landmarks), settled(rank, landmarks, sites), KEPT),
            ("held out", slice(len(asked) - held_out, None), settled_held_out(rank, held_out, sites), HELD_OUT_KEPT),
        ):
            if not (count := len(asked.ids[some])):
                continue
            if low not in (None, rank):
                size = count * numbers(sites) * dtype.itemsize / 2**30
                named = "landmarks" if kind == "landmark" else "questions held out"
                note(f"{count:,} {named} would take {size:.1f} GiB: kept at rank {low} (rank='full' for all of them)")
            given = point, asked.take(some), sites, Whitened(operator)
            gradients = precondition(*given, rank=low, kept=dtype, name="landmarks").gradients
            parts |= {f"{kind}/{key}": tensor for key, tensor in _tensors(gradients).items()}
        keep(folder, LANDMARKS, parts)
    return open_directions(folder, signs, seed)


def open_directions(folder: Folder | Memory, signs: int, seed: int) -> Directions:
    """The directions of an index."""
    tensors = folder.load(LANDMARKS)
    return Directions(_gradients(tensors, "landmark/"), _gradients(tensors, "held out/"), signs, seed)


def settled(rank: int | str, questions: int, sites: Mapping[str, Site]) -> int | None:
    """The rank that "auto" stands for; None for "full"."""
    if rank != "auto":
        return None if rank == "full" else int(rank)
    if questions * numbers(sites) * KEPT.itemsize <= BYTES:
        return None
    return max(1, BYTES // (questions * sum(sum(site.shape) for site in sites.values()) * KEPT.itemsize))


def settled_held_out(rank: int | str, questions: int, sites: Mapping[str, Site]) -> int | None:
    """That of questions held out; None for "full", and where they are small. A rank of the landmarks is none for these."""
    whole = questions * numbers(sites) * HELD_OUT_KEPT.itemsize
    return None if rank == "full" or whole <= BYTES else HELD_OUT_RANK


def affordable(rank: int | str, questions: int, sites: Mapping[str, Site]) -> int:
    """How many of the questions can be held out: at least one, and where their rank is low, what `HELD_OUT_BYTES` hold."""
    if (low := settled_held_out(rank, questions, sites)) is None:
        return questions
    return min(questions, max(1, HELD_OUT_BYTES // (numbers(sites, low) * HELD_OUT_KEPT.itemsize)))


def numbers(sites: Mapping[str, Site], rank: int | None = None) -> int:
    """Those of a question's gradients, whole or at a rank; a matrix that has fewer than its factors stays whole."""
    whole = [math.prod(site.shape) for site in sites.values()]
    if rank is None:
        return sum(whole)
    return sum(min(each, rank * sum(site.shape)) for each, site in zip(whole, sites.values(), strict=True))


def _tensors(gradients: Gradients) -> dict[str, Tensor]:
    """Of gradients that are whole or in two factors, by name."""
    found = {}
    for name, each in gradients.items():
        parts = {"out": each.g_BRO, "into": each.a_BRI} if isinstance(each, Factored) else {"whole": each.w_BOI}
        found |= {f"{part}/{name}": tensor for part, tensor in parts.items()}
    return found


def _gradients(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Gradient]:
    """The gradients of one kind that these tensors are, in the order of their names."""
    own = {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
    found: dict[str, Gradient] = {}
    for key, tensor in own.items():
        part, _, name = key.partition("/")
        if part != "into":
            found[name] = Dense(tensor) if part == "whole" else Factored(tensor, own[f"into/{name}"])
    return {name: found[name] for name in sorted(found)}

"""Influence of projected gradients: an empirical Fisher matrix of a few numbers per module, inverted exactly.

LoGra projects both sides of each module's gradient, SJLT all its numbers with few entries a column, FactGraSS some inputs and
outputs of it. The matrices are drawn with the seed of the scores, and never kept.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from whence.gradients import Gradients, dot
from whence.indexing.projected import Projected, curvature_of, drawn_second_moments, project_gradients
from whence.methods.base import Recipe, Request
from whence.operators import Operator
from whence.operators.projection import Shapes, leading_eigenvectors, random_projection
from whence.operators.sketch import masks, sparse_projections
from whence.settings import DAMPING, AtLeastZero, Count, Section, setting
from whence.store.scores import Scores


class Sides(Section):
    """How much of a gradient is kept."""

    dim: Count = setting(16, "Numbers per side to which the gradient of a module is projected.")


class Inverted(Sides):
    """What the second moments of projected gradients are damped with."""

    damping: AtLeastZero = setting(0.1, DAMPING)


class Labelled(Inverted):
    """Whose labels the second moments are of."""

    labels: Literal["data", "model"] = setting(
        "data",
        "Second moments of the rows' own labels, or, in a pass of its own, of labels drawn from the model (true Fisher).",
    )


class LoGra(Labelled):
    """LoGra: of both sides."""

    basis: Literal["random", "curvature"] = setting(
        "random", "Random signs, or the leading eigenvectors of EK-FAC factors, which are fitted where none are given."
    )


class Sparse(Labelled):
    """SJLT: of the whole gradient."""

    dim: Count = setting(16, "Root of the numbers to which the gradient of a module is projected.")
    nonzeros: Count = setting(1, "Sums that each number of a gradient goes into.")


class Masked(Sparse):
    """FactGraSS: of some inputs and outputs."""

    mask: Count = setting(64, "Inputs, and outputs, of a module that are kept before the projection.")


def logra(request: Request, settings: LoGra) -> Scores:
    """`(P grad m)^T (G + damping)^-1 P grad log p(row)`, `P = P_O kron P_I` (Choe et al. 2024, section 3.1).

    `G` is the mean of `g g^T` over the rows' projected gradients, a block per module.
    """
    if settings.basis == "curvature":
        projection = leading_eigenvectors(request.curvature().blocks, settings.dim)
    else:
        projection = random_projection(shapes_of(request), settings.dim, request.settings.seed)
    return influence(request, projection, settings, f"LoGra to {settings.dim} per side")


def sjlt(request: Request, settings: Sparse) -> Scores:
    """The same with a sparse Johnson-Lindenstrauss transform of each module's whole gradient (Hu et al. 2025, section 3)."""
    projection = sparse_projections(shapes_of(request), settings.dim**2, request.settings.seed, settings.nonzeros)
    return influence(request, projection, settings, f"SJLT to {settings.dim**2}")


def factgrass(request: Request, settings: Masked) -> Scores:
    """The same of the inputs and outputs that a mask keeps, before gradients are formed (Hu et al. 2025, section 3)."""
    masked = masks(shapes_of(request), settings.mask, request.settings.seed)
    sparse = sparse_projections(masked.sizes, settings.dim**2, request.settings.seed, settings.nonzeros)
    return influence(request, sparse @ masked, settings, f"FactGraSS to {settings.dim**2}")


def influence(request: Request, projection: Operator, settings: Labelled, title: str) -> Scores:
    """Influence of projected gradients, by their own second moments."""
    small = projected(request, projection)
    if settings.labels == "data":
        moments = small.second_moments()
    else:
        moments = drawn_second_moments(request.point, projection, request.settings, out=request.place("drawn"))
    inverse = curvature_of(moments, title).inverse(settings.damping)
    queries = inverse @ small.queries
    return small.scores(small.columns(lambda rows: dot(queries, rows)), inverse.label, n_train=request.settings.n_train)


def projected(request: Request, projection: Operator, name: str = "projected", **how: Any) -> Projected:
    """The pass over the rows, kept as a part of that name; at another `point` than the request's where one is given."""
    point = how.pop("point", request.point)
    return project_gradients(point, request.queries, projection, request.settings, out=request.place(name), **how)


def norms(gradients: Gradients) -> Tensor:
    """Of all blocks together, `[n]`."""
    return torch.stack([gradient.dense().w_BOI.square().sum((1, 2)) for gradient in gradients.values()]).sum(0).sqrt()


def cosines(raw_QN: Tensor, norms_Q: Tensor, norms_N: Tensor) -> Tensor:
    """Inner products over both norms; zero where one is."""
    lengths_QN = torch.outer(norms_Q.cpu(), norms_N)
    return torch.where(lengths_QN > 0, raw_QN / lengths_QN, 0.0)


def shapes_of(request: Request) -> Shapes:
    """Outputs and inputs of the tracked modules."""
    return {name: site.shape for name, site in request.point.cover(request.names).sites.items()}


GIVES: Any = {"whole": True, "price": "a pass over the rows, dim x dim numbers kept of each row and module"}
"""What recipes of projected gradients have in common."""

RECIPES = (
    Recipe("logra", "LoGra", "Choe et al. 2024, section 3.1", logra, LoGra, **GIVES, uses=("factors",)),
    Recipe("sjlt", "SJLT", "Kane & Nelson 2014; Hu et al. 2025, section 3", sjlt, Sparse, **GIVES),
    Recipe("factgrass", "FactGraSS", "Hu et al. 2025, section 3", factgrass, Masked, **GIVES),
)

"""Curvature matrices of a point as operators: products over all of its rows, for many vectors at once, nothing formed.

    damped = GaussNewton(point) + 1e-3 * Identity()
    damped @ gradients

All tracked weights interact. A product is a pass over the rows, shared out over the processes.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, Literal

from whence.engine.autograd import labels_drawn
from whence.engine.partition import Tell
from whence.engine.passes import Unsaved, run_pass, share_out
from whence.engine.point import Point
from whence.engine.products import Block, FisherProduct, curvature_product, gauss_newton, hessian
from whence.engine.sinks import Sums
from whence.engine.stream import drawn_likelihood
from whence.gradients import Dense, Gradients
from whence.operators import Operator

Kind = Literal["gauss-newton", "hessian", "fisher", "empirical-fisher"]


def matrix_of(kind: Kind, point: Point, modules: str | Sequence[str] | None = None) -> Matrix:
    """The matrix of that kind at the point; the Fisher matrix is that of one label drawn for each prediction."""
    if kind in ("fisher", "empirical-fisher"):
        return Fisher(point, modules, "model" if kind == "fisher" else "data")
    return {"gauss-newton": GaussNewton, "hessian": Hessian}[kind](point, modules)


class Matrix(Operator):
    """A matrix `[P, P]` of the mean training loss per example at a point, `P` being the weights of its tracked modules."""

    kind: str

    def __init__(self, point: Point, modules: str | Sequence[str] | None = None):
        self.point, self.sites = point, point.cover(modules).sites
        self.names = self.along = tuple(self.sites)
        self.label = f"{self.kind} of {len(point.examples.usable)} examples"

    def apply_to(self, gradients: Gradients) -> Gradients:
        """The product with the gradients of all examples given, in one pass over the rows."""
        vectors = {name: gradients[name].dense().w_BOI.to(self.point.like) for name in self.along}
        sums = self.product(vectors, self.point.examples.usable)
        return {name: Dense(sums[name] / len(self.point.examples.usable)) for name in self.names}

    @abc.abstractmethod
    def product(self, vectors: Block, rows: Sequence[int]) -> Block:
        """The sum over the rows, not divided by their number."""

    def identity(self) -> Any:
        """What it is a matrix of."""
        return {self.kind: self.point.provenance(), "modules": list(self.names)}


class GaussNewton(Matrix):
    """The Gauss-Newton matrix, `1/N sum_n J_n^T H_n J_n` (Schraudolph 2002); for cross-entropy also the Fisher matrix."""

    kind, of = "Gauss-Newton matrix", staticmethod(gauss_newton)

    def product(self, vectors: Block, rows: Sequence[int]) -> Block:
        """Forwards along the vectors, through the loss, and back."""
        point, sink = self.point, Sums(self.point.sums, self.point.device)

        def send(batches: list[list[int]], tell: Tell) -> None:
            given = (point.model, point.task, self.sites, point.examples.items, batches, vectors, tell)
            for name, w_KOI in curvature_product(self.of, *given).items():
                sink.sum_of(name, *w_KOI.shape).add_(w_KOI)

        share_out(point, point.examples, send, sink, "products", Unsaved(rows))
        return sink.totals


class Hessian(GaussNewton):
    """The Hessian, `d^2 loss / d weights^2` (Pearlmutter 1994), which may have negative eigenvalues.

    With `along` only its columns of these modules: all other gradients count as zero, and are not asked for.
    """

    kind, of = "Hessian", staticmethod(hessian)

    def __init__(self, point: Point, modules: str | Sequence[str] | None = None, along: Sequence[str] = ()):
        super().__init__(point, modules)
        self.along = tuple(along) or self.names

    def identity(self) -> Any:
        """What it is a matrix of, and which of its columns."""
        columns = {} if self.along == self.names else {"along": list(self.along)}
        return {**super().identity(), **columns}


class Fisher(Matrix):
    """The Fisher matrix of labels drawn from the model with `seed`, or of the data's own (the empirical one)."""

    def __init__(
        self,
        point: Point,
        modules: str | Sequence[str] | None = None,
        labels: Literal["model", "data"] = "model",
        seed: int = 0,
    ):
        self.labels = labels_drawn(point, point.cover(modules).sites) if labels == "model" else labels
        self.seed = seed
        self.kind = "Fisher matrix" if self.labels == "model" else "empirical Fisher matrix"
        super().__init__(point, modules)

    def product(self, vectors: Block, rows: Sequence[int]) -> Block:
        """`sum_n g_n <g_n, v>` as the gradients `g_n` arise."""
        point, sink = self.point, FisherProduct(vectors)
        drawn = drawn_likelihood(point.task, point.examples, f"{self.seed}:product")
        objective = point.likelihood if self.labels == "data" else drawn
        run_pass(point, self.sites, point.examples, objective, sink, "products", Unsaved(rows))
        return sink.totals

    def identity(self) -> Any:
        """What it is a matrix of, and of which labels."""
        return {**super().identity(), "seed": self.seed}

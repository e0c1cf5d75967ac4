"""The mean of the rows' damped inverses, an operator that Sherman and Morrison's formula gives in two passes over the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.engine.partition import SAVE_SECONDS, data_chunks, keep
from whence.engine.passes import ByClock, run_pass
from whence.engine.point import Point
from whence.engine.sinks import Sums
from whence.errors import NumericalError
from whence.gradients import Dense, Gradient, Gradients, chunks, dot_module
from whence.operators import Identity, Operator
from whence.store.fingerprint import fingerprint_operator, fingerprint_tensors
from whence.store.memory import work

CHUNKS = 64
"""Parts of the rows after which a pass may be saved."""


class MeanInverse(Operator):
    """`1/n sum_i (g_i g_i^T + lambda)^-1` of each module, `g_i` the rows' gradients: Sherman and Morrison, nothing formed.

    `r = 1/(n lambda) sum_i [v - g_i <g_i, v> / (lambda + |g_i|^2)]`, lambda being `damping` times the module's mean squared
    gradient entry, or `absolute`. `place` says where sums are kept, so that a killed pass resumes.
    """

    def __init__(
        self,
        point: Point,
        names: Sequence[str],
        damping: float = 0.1,
        absolute: float | None = None,
        place: Callable[[str], Path | None] = lambda name: None,
    ):
        self.point, self.sites, self.names = point, point.cover(names).sites, tuple(names)
        self.damping, self.absolute, self.place = damping, absolute, place
        how = f"damping {damping:g} x mean squared entry" if absolute is None else f"damping {absolute:g}"
        self.label = f"DataInf of {len(point.examples.usable)} examples, {how}"

    def identity(self) -> Any:
        """Of what rows, and how it is damped."""
        return {"mean of inverses": self.point.provenance(), "damping": [self.damping, self.absolute]}

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Its product with all gradients given. Raises NumericalError where no row has a gradient at a module."""
        v = {name: gradients[name].dense().w_BOI.to(self.point.like) for name in self.names}
        damping, rows = self.dampings(), len(self.point.examples.usable)
        along = self._summed(Shrunk(v, damping), "products", v)
        return {name: Dense((v[name] - along[name] / rows) / damping[name]) for name in self.names}

    def dampings(self) -> dict[str, float]:
        """Lambda of each module."""
        if self.absolute is not None:
            return dict.fromkeys(self.names, self.absolute)
        sums = self._summed(Squares(self.point.like), "squares")
        entries = {name: len(self.point.examples.usable) * site.shape[0] * site.shape[1] for name, site in self.sites.items()}
        damping = {name: self.damping * float(sums[name]) / entries[name] if name in sums else 0.0 for name in self.names}
        if still := [name for name, value in damping.items() if not value > 0]:
            raise NumericalError(
                f"No row has a gradient at {still[0]}, so that there is nothing to damp it by",
                given=f"{len(still)} of {len(damping)} modules",
                fix="leave it out of --modules, or give absolute_damping",
            )
        return damping

    def _summed(self, sink: Sums, name: str, of: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the sink sums up over all rows; saved by the clock, and once it is complete."""
        point, examples = self.point, self.point.examples

        def made_from() -> dict[str, Any]:
            return {"stage": name, **fingerprint_operator(self), "of": fingerprint_tensors(of or {})}

        with work(self.place(name), made_from) as folder:
            parts = data_chunks(examples.usable, examples.sizes, CHUNKS)
            run_pass(
                point,
                self.sites,
                examples,
                point.likelihood,
                sink,
                name,
                ByClock(parts, folder, "sums", save_every=SAVE_SECONDS),
            )
            keep(folder, "sums", sink.state() | {"chunks": torch.tensor(len(parts))})
        return sink.totals


class Squares(Sums):
    """The sum of the rows' squared norms, of each module."""

    def __init__(self, like: Tensor):
        super().__init__(torch.float64, like.device)
        self.squared = Identity().streaming(like).quadratic

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Add the module's part."""
        self.sum_of(name).add_(self.squared(name, gradient, readers).double().sum())


class Shrunk(Sums):
    """The sum of `g_i <g_i, v> / (lambda + |g_i|^2)`, of each module and each of the vectors `v`."""

    def __init__(self, v: Mapping[str, Tensor], damping: Mapping[str, float]):
        self.v, self.damping = {name: Dense(w_QOI) for name, w_QOI in v.items()}, damping
        like = next(iter(v.values()))
        super().__init__(like.dtype, like.device)
        self.squared = Identity().streaming(like).quadratic

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Add the module's part."""
        sums_QX = self.sum_of(name, *self.v[name].w_BOI.shape).flatten(1)
        for part in chunks(gradient.to(self.dtype), sums_QX.shape[1]):
            w = part.dense()
            along_QB = dot_module(self.v[name], w) / (self.damping[name] + self.squared(name, w, readers))
            sums_QX.addmm_(along_QB, w.w_BOI.flatten(1))

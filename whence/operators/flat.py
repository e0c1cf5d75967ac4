"""Gradients of all modules as one vector each, for mathematics that knows of no modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.gradients import Dense, Gradients
from whence.operators.base import Operator


@dataclass(frozen=True)
class Flat:
    """The order of modules, and each one's shape `(O, I)`: `K` gradients are `[K, P]`."""

    shapes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, gradients: Gradients, names: tuple[str, ...]) -> Flat:
        """That of these modules' gradients."""
        return cls({name: gradients[name].shape[1:] for name in names})

    @property
    def size(self) -> int:
        """P."""
        return sum(map(math.prod, self.shapes.values()))

    def vectors(self, gradients: Gradients) -> Tensor:
        """`[K, P]`."""
        return torch.cat([gradients[name].dense().w_BOI.flatten(1) for name in self.shapes], 1)

    def gradients(self, v_KP: Tensor) -> dict[str, Dense]:
        """The way back."""
        parts = v_KP.split([math.prod(shape) for shape in self.shapes.values()], 1)
        return {name: Dense(part.unflatten(1, shape)) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def multiply(self, operator: Operator) -> Callable[[Tensor], Tensor]:
        """The operator as a map of `[K, P]`."""
        return lambda v_KP: self.vectors(operator @ self.gradients(v_KP)).to(v_KP)

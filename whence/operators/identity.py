"""The operator that leaves gradients as they are: gradient dot products, and what other operators are made with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from whence.gradients import Gradient, Gradients, chunks
from whence.operators.base import Operator, Scaled, Streaming
from whence.settings import valid_damping


class Identity(Operator):
    """The identity on these modules, or on all that there are. It holds no numbers."""

    def __init__(self, names: Iterable[str] = (), label: str = "identity"):
        self.names, self.label = tuple(names), label

    @property
    def blockwise(self) -> bool:
        """It is."""
        return True

    def apply_to(self, gradients: Gradients) -> Gradients:
        """The gradients of its modules."""
        return {name: gradient for name, gradient in gradients.items() if name in self.names} if self.names else gradients

    def identity(self) -> Any:
        """That it is the identity, and where."""
        return {"identity": sorted(self.names)}

    def streaming(self, like: Tensor | None = None) -> Streaming:
        """Gradients as they are, in the dtype of `like`."""
        return _AsTheyAre(None if like is None else like.dtype)

    def apply(self, function: Callable[[Tensor], Tensor], label: str = "a function") -> Operator:
        """The same function of it: what the function makes of its eigenvalue 1, times it."""
        return Scaled(float(function(torch.ones((1, 1), dtype=torch.float64))), self, f"{self.label}, {label}")

    def inverse(self, damping: float = 0.1, *, absolute: float | None = None) -> Operator:
        """`(1 + lambda)^-1`, lambda being `damping` times the mean eigenvalue, 1, or `absolute`."""
        damping, absolute = valid_damping(damping, absolute)
        how = f"damping {damping:g} x mean eigenvalue" if absolute is None else f"damping {absolute:g}"
        chosen = damping if absolute is None else absolute
        return self.apply(lambda ones: (ones + chosen).reciprocal(), f"inverse with {how}")


class _AsTheyAre(Streaming):
    def __init__(self, dtype: torch.dtype | None):
        self.dtype = dtype

    def apply(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Gradient:
        return gradient if self.dtype is None else gradient.to(self.dtype)

    def quadratic(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Tensor:
        """Squared norms, `[B]`."""
        parts = chunks(self.apply(name, gradient, readers), 2 * gradient.shape[1] * gradient.shape[2])
        return torch.cat([torch.linalg.vector_norm(part.dense().w_BOI, dim=(1, 2)).square() for part in parts])

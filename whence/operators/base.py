"""What an operator is: something that maps gradients to gradients."""

from __future__ import annotations

import abc
from typing import overload

import torch
from torch import Tensor

from whence.gradients import Dense, Gradient, Gradients


class Operator(abc.ABC):
    """A linear map `Gradients -> Gradients`; `A @ gradients` applies it, `A @ B` composes (B acts first).

    It acts on each module by itself, so it can be applied to one module's gradients after the other, as they arise.
    """

    label: str
    """What it is, for people: "ekfac on 600 examples, inverse with damping 0.1 x mean eigenvalue"."""

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """The modules it acts on."""

    @abc.abstractmethod
    def apply_to(self, gradients: Gradients) -> Gradients:
        """The map itself."""

    @abc.abstractmethod
    def quadratic(self, gradients: Gradients) -> Tensor:
        """`<g, operator g>` of each example, `[B]`."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that tell this operator from another, for fingerprints."""

    @abc.abstractmethod
    def to(self, like: Tensor) -> Operator:
        """The same in the dtype and on the device of `like`."""

    @abc.abstractmethod
    def dense(self) -> dict[str, Tensor]:
        """One matrix `[O*I, O*I]` per module, for tests: row-major in (O, I)."""

    def streaming(self) -> Streaming:
        """Itself, for the gradients of one batch after the other, module by module."""
        return Streaming(self)

    @overload
    def __matmul__(self, other: Operator) -> Operator: ...
    @overload
    def __matmul__(self, other: Gradients) -> Gradients: ...
    def __matmul__(self, other: Operator | Gradients) -> Operator | Gradients:
        return Product(self, other) if isinstance(other, Operator) else self.apply_to(other)


class Streaming:
    """An operator that meets the modules' gradients one by one, in whatever format; `readers` read the same input."""

    def __init__(self, operator: Operator):
        self.operator = operator
        self.dtype = next(iter(operator.tensors().values())).dtype

    def apply(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Dense:
        """`operator @ gradient` at the module `name`."""
        return self.operator.apply_to({name: gradient.to(self.dtype)})[name].dense()

    def quadratic(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Tensor:
        """The module's part of `<g, operator g>` of each example, `[B]`."""
        return self.operator.quadratic({name: gradient.to(self.dtype)})


class Product(Operator):
    """`left @ right`: apply `right`, then `left`."""

    def __init__(self, left: Operator, right: Operator):
        self.left, self.right = left, right
        self.label = f"({left.label}) after ({right.label})"

    @property
    def names(self) -> tuple[str, ...]:
        """The modules that both act on."""
        return tuple(name for name in self.right.names if name in self.left.names)

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Apply `right`, then `left`."""
        return self.left.apply_to(self.right.apply_to(gradients))

    def quadratic(self, gradients: Gradients) -> Tensor:
        """`<g, left right g>` of each example, `[B]`."""
        mapped = self.apply_to(gradients)
        return torch.stack([(w.dense().w_BOI * gradients[name].dense().w_BOI).sum((1, 2)) for name, w in mapped.items()]).sum(0)

    def tensors(self) -> dict[str, Tensor]:
        """Those of both."""
        return {f"{side}/{name}": t for side in ("left", "right") for name, t in getattr(self, side).tensors().items()}

    def to(self, like: Tensor) -> Product:
        """The same in the dtype and on the device of `like`."""
        return Product(self.left.to(like), self.right.to(like))

    def dense(self) -> dict[str, Tensor]:
        """The product of the matrices, for the modules that both have."""
        left, right = self.left.dense(), self.right.dense()
        return {name: left[name] @ right[name] for name in left if name in right}

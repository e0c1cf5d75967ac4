"""What an operator is: something that maps gradients to gradients, and what can be made of such maps.

    inverse @ gradients          apply it
    left @ right                 right first
    left + right, 0.5 * left     add up, scale

Influence between two points of training is a product of operators, a damped curvature a sum, SOURCE a sum of products.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from whence.gradients import Dense, Factored, Gradient, Gradients, chunks
from whence.settings import valid


class Operator(abc.ABC):
    """A linear map `Gradients -> Gradients`, by which a query's gradients are multiplied before they meet those of the rows.

    One of your own has a `label`, `names`, `apply_to` and an `identity`; whatever work its map takes, it may do in `apply_to`,
    which gets the gradients of all queries at once.

        class Halved(Operator):
            label, names = "a half of each gradient", ()

            def apply_to(self, gradients):
                return {name: Dense(gradient.dense().w_BOI / 2) for name, gradient in gradients.items()}

            def identity(self):
                return "halved"
    """

    label: str
    """What it is, for people: "ekfac on 600 examples, inverse with damping 0.1 x mean eigenvalue"."""

    names: tuple[str, ...]
    """The modules it acts on; none for all that there are."""

    about: Mapping[str, Any] = {}
    """What came of its work once it has been applied, such as the residual of what it solved: it goes with the scores."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The modules whose gradients it takes, which may be more than those that it gives (`names`)."""
        return self.names

    @property
    def blockwise(self) -> bool:
        """Whether it acts on each module by itself, so that it can be applied as gradients arise (`streaming`)."""
        return False

    @abc.abstractmethod
    def apply_to(self, gradients: Gradients) -> Gradients:
        """The map itself; modules that it does not act on are left out."""

    @abc.abstractmethod
    def identity(self) -> Any:
        """What tells it from another, for provenance: JSON values, and tensors, which are hashed."""

    def streaming(self, like: Tensor | None = None) -> Streaming:
        """Itself, if it is blockwise, for one module's gradients after the other; in the dtype and on the device of `like`."""
        raise TypeError(f"{self.label} does not act on each module by itself: apply it to all gradients at once")

    def on_tensors(self, like: Tensor) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """Itself as a map of matrices by module, `{module: w_KOI}`, as `whence.linalg.krylov` takes them."""
        one = self.streaming(like) if self.blockwise else None

        def apply(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
            given: dict[str, Gradient] = {name: Dense(w_KOI) for name, w_KOI in w.items()}
            found = {name: one.apply(name, g, (name,)) for name, g in given.items()} if one else self.apply_to(given)
            return {name: gradient.dense().w_BOI for name, gradient in found.items()}

        return apply

    @overload
    def __matmul__(self, other: Operator) -> Operator: ...
    @overload
    def __matmul__(self, other: Gradients) -> Gradients: ...
    def __matmul__(self, other: Operator | Gradients) -> Operator | Gradients:
        return Product(self, other) if isinstance(other, Operator) else self.apply_to(other)

    def __add__(self, other: Operator) -> Operator:
        return Sum(self, other)

    def __mul__(self, factor: float) -> Operator:
        return Scaled(factor, self)

    __rmul__ = __mul__


class Streaming(abc.ABC):
    """A blockwise operator that meets the modules' gradients one by one; `readers` are the sites that read the same input."""

    @abc.abstractmethod
    def apply(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Gradient:
        """`operator @ gradient` at the module `name`."""

    def ahead(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Matrices `[I, P]` that inputs of the modules `names` are multiplied with on the way forward already, by module.

        From then on `apply` is given factored gradients of these modules with `a_BRP` for `a_BRI`.
        """
        return {}

    def quadratic(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Tensor:
        """The module's part of `<g, operator g>` of each example, `[B]`."""
        parts = chunks(gradient, 3 * gradient.shape[1] * gradient.shape[2])
        applied = (self.apply(name, part, (name,)).dense().w_BOI for part in parts)
        return torch.cat([(w * part.to(w.dtype).dense().w_BOI).sum((1, 2)) for w, part in zip(applied, parts, strict=True)])


class _Pair(Operator):
    """Two operators; it acts on the modules that both act on."""

    def __init__(self, left: Operator, right: Operator):
        self.left, self.right = left, right
        self.label = f"({left.label}) {self.word} ({right.label})"

    word: str

    @property
    def about(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Of both."""
        return {**self.left.about, **self.right.about}

    @property
    def names(self) -> tuple[str, ...]:
        """The modules that both act on."""
        left, right = self.left.names, self.right.names
        return tuple(name for name in right if name in left) if left and right else left or right

    @property
    def blockwise(self) -> bool:
        """Whether both are."""
        return self.left.blockwise and self.right.blockwise

    def identity(self) -> Any:
        """Of both."""
        return {self.word: [self.left.identity(), self.right.identity()]}

    def streaming(self, like: Tensor | None = None) -> Streaming:
        """Both, one after the other."""
        return _StreamingPair(self, self.left.streaming(like), self.right.streaming(like))

    @abc.abstractmethod
    def together(self, gradient: Gradient, left: Any, right: Any) -> Gradient:
        """What comes of one module's gradient, `left` and `right` being maps of gradients."""


class _StreamingPair(Streaming):
    def __init__(self, pair: _Pair, left: Streaming, right: Streaming):
        self.pair, self.left, self.right = pair, left, right

    def apply(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Gradient:
        parts = (
            lambda g, part=part: part.apply(name, g, readers if g is gradient else (name,)) for part in (self.left, self.right)
        )
        return self.pair.together(gradient, *parts)


class Product(_Pair):
    """`left @ right`: apply `right`, then `left`."""

    word = "after"

    @property
    def names(self) -> tuple[str, ...]:
        """The modules that both act on, and those that `left` gives without reading them."""
        both, read = super().names, self.left.reads
        return both + tuple(name for name in self.left.names if name not in read)

    @property
    def reads(self) -> tuple[str, ...]:
        """What `right` does; where modules don't interact, only what comes through both."""
        return self.names if self.blockwise else self.right.reads or self.names

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Apply `right`, then `left`."""
        return self.left.apply_to(self.right.apply_to(gradients))

    def together(self, gradient: Gradient, left: Any, right: Any) -> Gradient:
        return left(right(gradient))


class Sum(_Pair):
    """`left + right`."""

    word = "plus"

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Add up what both give, for the modules that both act on."""
        left, right = self.left.apply_to(gradients), self.right.apply_to(gradients)
        return {name: _added(left[name], right[name]) for name in left if name in right}

    def together(self, gradient: Gradient, left: Any, right: Any) -> Gradient:
        return _added(left(gradient), right(gradient))


def _added(left: Gradient, right: Gradient) -> Dense:
    return Dense(left.dense().w_BOI + right.dense().w_BOI)


def _scaled(factor: float, gradient: Gradient) -> Gradient:
    if isinstance(gradient, Factored):
        return replace(gradient, g_BRO=factor * gradient.g_BRO)
    return Dense(factor * gradient.w_BOI)


class Scaled(Operator):
    """`factor * operator`."""

    def __init__(self, factor: float, operator: Operator, label: str = ""):
        self.factor, self.operator = valid(float, factor, "factor"), operator
        self.label = label or f"{factor:g} x ({operator.label})"
        self.names = operator.names

    @property
    def about(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Of what is scaled."""
        return self.operator.about

    @property
    def blockwise(self) -> bool:
        """Whether what is scaled is."""
        return self.operator.blockwise

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Apply it, and scale."""
        return {name: _scaled(self.factor, gradient) for name, gradient in self.operator.apply_to(gradients).items()}

    def identity(self) -> Any:
        """The factor, and of what."""
        return {"factor": self.factor, "of": self.operator.identity()}

    def streaming(self, like: Tensor | None = None) -> Streaming:
        """The same, module by module."""
        return _StreamingScaled(self.factor, self.operator.streaming(like))


class _StreamingScaled(Streaming):
    def __init__(self, factor: float, inner: Streaming):
        self.factor, self.inner = factor, inner

    def apply(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Gradient:
        return _scaled(self.factor, self.inner.apply(name, gradient, readers))

    def quadratic(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Tensor:
        return self.factor * self.inner.quadratic(name, gradient, readers)

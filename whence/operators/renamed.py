"""An operator of one model's modules for the gradients of another's, which calls them otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from whence.gradients import Gradient, Gradients
from whence.operators.base import Operator, Streaming


class Renamed(Operator):
    """The operator where module `name` is called `names[name]`; modules that `names` lacks are left out.

    `made` are names of further modules of the operator, of which no gradients are given: it makes theirs of the others'.
    """

    def __init__(self, operator: Operator, names: Mapping[str, str], made: Mapping[str, str] = MappingProxyType({})):
        known, self.made = {*operator.names, *operator.reads}, frozenset(made)
        every = {**names, **made}
        self.operator, self.inner = operator, {name: own for name, own in every.items() if own in known or not known}
        self.names = tuple(name for name, own in self.inner.items() if own in operator.names or not known)
        self.label = operator.label

    @property
    def about(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The operator's."""
        return self.operator.about

    @property
    def reads(self) -> tuple[str, ...]:
        """What the operator does, of what there is."""
        given = {name: own for name, own in self.inner.items() if name not in self.made}
        return tuple(name for name, own in given.items() if own in self.operator.reads or not self.operator.reads)

    @property
    def blockwise(self) -> bool:
        """Whether the operator is, and makes nothing."""
        return self.operator.blockwise and not self.made

    def apply_to(self, gradients: Gradients) -> Gradients:
        """Apply it to the gradients under its own names for them."""
        found = self.operator.apply_to({own: gradients[name] for name, own in self.inner.items() if name in gradients})
        return {name: found[own] for name, own in self.inner.items() if own in found}

    def identity(self) -> Any:
        """The operator's, and the names."""
        return {"renamed": self.inner, "of": self.operator.identity()}

    def streaming(self, like: Tensor | None = None) -> Streaming:
        """The same, module by module."""
        return _StreamingRenamed(self.inner, self.operator.streaming(like))


class _StreamingRenamed(Streaming):
    def __init__(self, inner: Mapping[str, str], of: Streaming):
        self.inner, self.of = inner, of

    def apply(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Gradient:
        return self.of.apply(self.inner[name], gradient, self._readers(readers))

    def ahead(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        ours = {self.inner[name]: name for name in names if name in self.inner}
        return {ours[own]: matrix for own, matrix in self.of.ahead(ours).items()}

    def quadratic(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Tensor:
        return self.of.quadratic(self.inner[name], gradient, self._readers(readers))

    def _readers(self, readers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self.inner.get(each, each) for each in readers)

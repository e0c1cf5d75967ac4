"""The methods, each by what its basis is and where its eigenvalues come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from whence.errors import UsageError


@dataclass(frozen=True)
class Method:
    """A curvature approximation that is diagonal in a Kronecker-factored basis.

    `basis`: that of the weight itself; the eigenvectors of the covariances of inputs and output gradients, position by
    position ("kfac"); or those of each example's whole gradient ("shampoo").
    `eigenvalues`: all one; products of the covariances' eigenvalues; or the gradients' second moments measured in the basis.
    """

    name: str
    basis: Literal["identity", "kfac", "shampoo"]
    eigenvalues: Literal["one", "product", "measured"]
    source: str


METHODS = {
    method.name: method
    for method in (
        Method("identity", "identity", "one", "gradient dot product"),
        Method("diagonal", "identity", "measured", "Kirkpatrick et al. 2017, the diagonal of the Fisher matrix"),
        Method("kfac", "kfac", "product", "Martens & Grosse 2015"),
        Method("ekfac", "kfac", "measured", "George et al. 2018; Grosse et al. 2023"),
        Method("shampoo", "shampoo", "measured", "Gupta et al. 2018, with corrected eigenvalues"),
    )
}


def method_named(name: str) -> Method:
    """The method of that name; UsageError lists the names there are."""
    if name not in METHODS:
        raise UsageError(f"There is no method {name!r}", accepted=", ".join(METHODS))
    return METHODS[name]

"""Covariances of what each module reads and of the gradients of what it writes, and the eigenbases that they give."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from whence import dist
from whence.cost import worth_rounding
from whence.coverage import Site
from whence.engine.sinks import Sums
from whence.engine.stream import Owner, everybody
from whence.gradients import Factored, Gradient
from whence.linalg.eigh import eigh
from whence.linalg.gram import add_gram
from whence.linalg.rotation import Rotation, split_sizes
from whence.precision import rounded


@dataclass
class _Shared:
    """An input that several sites read, until all of them have their gradient."""

    a_BRI: Tensor
    active_BR: Tensor
    arrived: set[str] = field(default_factory=set)


class Covariance(Sums):
    """Sums of `g g^T` and `a a^T` over positions ("kfac"), or of `w w^T` and `w^T w` over examples ("shampoo").

    A position counts where the loss reaches the module's output there: padding, and positions after the last token in
    the loss or that no later layer reads, have no gradient, and are no sample of the inputs that go with one. Sites
    that read the same input share its sum, over the positions where any of them has a gradient. Gradients that are no
    sum over positions (norms, grouped convolutions) are summed by example.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        by: Literal["kfac", "shampoo"],
        *,
        operands: torch.dtype,
        sums: torch.dtype,
        device: torch.device,
        largest: int | None = None,
    ):
        self.sites, self.by, self.operands, self.largest = sites, by, operands, largest
        self.groups: dict[str, str] = {}
        """The input group of each site: the first site that reads the same input."""
        self._shared: dict[tuple[str, ...], _Shared] = {}
        super().__init__(sums, device)

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Add one site's share of the batch."""
        gradient = gradient.to(self.operands)
        if self.by == "shampoo" or not isinstance(gradient, Factored):
            w_BOI = gradient.dense().w_BOI
            self._assign(name, name)
            self.sum_of(f"by_example/{name}", 1).add_(len(w_BOI))
            self._add_output(name, w_BOI.mT, torch.ones(len(w_BOI)))
            self._add_input(name, w_BOI, torch.ones(len(w_BOI)))
            return
        active_BR = _active(gradient.g_BRO)
        self._add_output(name, gradient.g_BRO, active_BR)
        tracked = tuple(reader for reader in readers if reader in self.sites)
        shared = self._shared.setdefault(tracked, _Shared(gradient.a_BRI, active_BR))
        shared.active_BR = shared.active_BR | active_BR
        shared.arrived.add(name)
        self._assign(name, tracked[0])
        if len(shared.arrived) == len(tracked):
            self._close(tracked)

    def end(self) -> None:
        """Add the inputs of which some reader had no gradient."""
        for readers in list(self._shared):
            self._close(readers)

    def state(self, rows: Collection[int] | None = None) -> dict[str, Tensor]:
        """The sums, and the input group of each site by its number."""
        order = list(self.sites)
        groups = [order.index(self.groups[name]) if name in self.groups else -1 for name in order]
        return super().state() | {"groups": torch.tensor(groups)}

    def load(self, state: Mapping[str, Tensor], owner: Owner = everybody) -> None:
        """Go back to a state."""
        order, sums = list(self.sites), dict(state)
        groups = zip(order, sums.pop("groups").tolist(), strict=True) if "groups" in sums else ()
        self.groups = {name: order[group] for name, group in groups if group >= 0}
        super().load(sums, owner)

    def restart(self) -> None:
        """Forget what came since the last `merge`; input groups stay as they are."""
        self._shared.clear()
        super().restart()

    def merge(self, owner: Owner = everybody) -> None:
        """Agree on the input groups, and hand the sums to the processes that keep them."""
        for found in dist.from_all(self.groups):
            for name, group in found.items():
                self._assign(name, group)
        super().merge(owner)

    def keeper(self, key: str) -> str:
        """The site that a sum belongs to: those of sites that read the same input belong together."""
        side, _, name = key.partition("/")
        site = name.rpartition("/")[0] if side in ("out", "in") else name
        return self.groups.get(site, site)

    def _assign(self, name: str, group: str) -> None:
        if self.groups.setdefault(name, group) != group:
            raise RuntimeError(f"{name} shared its input with {self.groups[name]} before, and now with {group}")

    def _close(self, readers: tuple[str, ...]) -> None:
        shared = self._shared.pop(readers)
        everywhere = shared.active_BR.device.type == "cpu" and bool(shared.active_BR.all())
        masked = shared.a_BRI if everywhere else shared.a_BRI * shared.active_BR.unsqueeze(-1)
        self._add_input(readers[0], masked, shared.active_BR)

    def _add_output(self, name: str, g: Tensor, counted: Tensor) -> None:
        self.sum_of(f"out_count/{name}", 1).add_(counted.sum())
        if self.sites[name].layer.one_hot:
            self.sum_of(f"out_diagonal/{name}", g.shape[-1]).add_(g.square().flatten(0, -2).sum(0))
        else:
            self._add_blocks(f"out/{name}", g)

    def _add_input(self, group: str, a: Tensor, counted: Tensor) -> None:
        self.sum_of(f"in_count/{group}", 1).add_(counted.sum())
        self._add_blocks(f"in/{group}", a)

    def _add_blocks(self, name: str, x: Tensor) -> None:
        """Add `x^T x` of the rows of `x [..., n]`, diagonal block by diagonal block; their lower triangles count."""
        rows = x.flatten(0, -2)
        for number, part in enumerate(rows.split(split_sizes(rows.shape[-1], self.largest), dim=-1)):
            width = part.shape[-1]
            if worth_rounding(width, len(part), width):
                part = rounded(part)
            add_gram(self.sum_of(f"{name}/{number}", width, width), part)


def _active(g_BRO: Tensor) -> Tensor:
    """Where a position has a gradient at all, `[B, R]`. A NaN counts as one."""
    active_BR = g_BRO.sum(-1) != 0
    if g_BRO.device.type == "cpu" and bool(active_BR.all()):  # as nearly always; asking every number takes ten times as long
        return active_BR
    return (g_BRO != 0).any(-1)


def decompose(sums: dict[str, Tensor], name: str, group: str, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The eigenvectors and eigenvalues of a site's covariances, which are used up; not of an input in `known` already.

    Covariances are means over positions (or examples), so their eigenvalues are too.
    """
    result = {key: sums[key] for key in (f"by_example/{name}", f"out_count/{name}", f"in_count/{group}") if key in sums}
    for side, key, what in (("out", name, "the output gradients"), ("in", group, "the inputs")):
        count = sums[f"{side}_count/{key}"].clamp(min=1)
        if f"{side}_diagonal/{key}" in sums:
            result[f"{side}_values/{key}"] = sums[f"{side}_diagonal/{key}"] / count
        elif f"{side}_values/{key}" not in known:
            values: list[Tensor] = []
            while (total := sums.pop(block := f"{side}/{key}/{len(values)}", None)) is not None:
                found, vectors = eigh(total.div_(count), f"{what} of {key}")
                result[block] = vectors.to(total.dtype)
                values.append(found.to(total.dtype))
            result[f"{side}_values/{key}"] = torch.cat(values)
    return result


def rotations(bases: Mapping[str, Tensor]) -> dict[str, Rotation]:
    """The eigenbasis of every side, `out/NAME` and `in/GROUP`; a side whose covariance is diagonal as it is has none."""
    parts: dict[str, dict[int, Tensor]] = {}
    for key, vectors in bases.items():
        side, _, number = key.rpartition("/")
        if side.startswith(("out/", "in/")):
            parts.setdefault(side, {})[int(number)] = vectors
    return {side: Rotation(tuple(blocks[number] for number in sorted(blocks))) for side, blocks in parts.items()}


def null_spaces(bases: Mapping[str, Tensor], side: str, key: str, other: int) -> list[slice]:
    """Where a side's eigenvalues are zero to working precision, for each diagonal block: directions that no sample had.

    A mean over positions has at most their number as its rank, one over examples `other` (the width of the other side) times
    that. Any basis of such a space is as good as another, and rounding chooses one.
    """
    values, start, number, found = bases[f"{side}_values/{key}"], 0, 0, []
    samples = int(bases[f"{side}_count/{key}"]) * (other if f"by_example/{key}" in bases else 1)
    while (vectors := bases.get(f"{side}/{key}/{number}")) is not None:
        width, number = vectors.shape[-1], number + 1
        part = values[start : start + width]
        small = torch.finfo(values.dtype).eps * width * part[-1]
        found.append(slice(start, start + max(width - samples, int((part <= small).sum()))))
        start += width
    return found


def levelled(lam_OI: Tensor, outputs: Sequence[slice], inputs: Sequence[slice]) -> Tensor:
    """Eigenvalues that are alike in all directions of each null space: their mean there, which is the same in any basis."""
    for rows in outputs:
        lam_OI[rows] = lam_OI[rows].mean(0, keepdim=True)
    for columns in inputs:
        lam_OI[:, columns] = lam_OI[:, columns].mean(1, keepdim=True)
    return lam_OI


def kronecker_eigenvalues(bases: Mapping[str, Tensor], name: str, group: str) -> Tensor:
    """The eigenvalues `[O, I]` of the K-FAC block `E[g g^T] kron E[a a^T]` of the mean loss *per example*.

    An example's gradient is a sum over positions. If these are independent, as with labels drawn from the model, its
    second moment is that of one position times the positions per example; so the product of the means over positions
    takes this factor, and damping means the same as with EK-FAC. Where the means are over examples, the product is
    divided by the trace that both factors have.
    """
    out, into = bases[f"out_values/{name}"], bases[f"in_values/{group}"]
    if f"by_example/{name}" in bases:
        scale = 1 / into.sum().clamp(min=torch.finfo(into.dtype).tiny)
    else:
        scale = bases[f"out_count/{name}"] / bases["examples"].to(out)
    return torch.outer(out, into) * scale


@dataclass(frozen=True)
class Sides:
    """The eigenvalues of a module's two covariances, in the order of the basis: that of the block's rows and columns."""

    out_O: Tensor
    """Of the output gradients' covariance."""
    in_I: Tensor
    """Of the inputs' covariance; modules that read the same input have the same tensor."""
    out_count: int
    """What the output gradients' covariance is a mean over: positions, or examples where `by_example`."""
    in_count: int
    by_example: bool
    """Whether they are covariances of whole gradients, `E[w w^T]` and `E[w^T w]`."""
    group: str
    """The module under whose name the inputs' covariance is kept: the first that reads the same input."""


def sides_of(bases: Mapping[str, Tensor], name: str, group: str) -> Sides | None:
    """The eigenvalues of a module's covariances; None where they were not kept, or there are none."""
    if f"out_values/{name}" not in bases or f"in_values/{group}" not in bases:
        return None
    return Sides(
        bases[f"out_values/{name}"],
        bases[f"in_values/{group}"],
        int(bases[f"out_count/{name}"]),
        int(bases[f"in_count/{group}"]),
        f"by_example/{name}" in bases,
        group,
    )

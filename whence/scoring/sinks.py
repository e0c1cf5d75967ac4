"""Sinks that turn the training examples' gradients into scores while the backward pass runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from whence.engine.stream import Sink
from whence.errors import UsageError
from whence.gradients import Factored, Gradient, Gradients, chunks, dot_module
from whence.operators.base import Operator
from whence.tasks.base import Batch, Task


class Quantity(Protocol):
    """What a module's gradients add to a number per example: `[..., B]`, per token `[..., B, R]`, or None."""

    def __call__(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Tensor | None: ...


class Columns(Sink):
    """Adds up each quantity over the modules of a batch and files the sums by example.

    `columns[key]` has one tensor per example of `indices`: the quantity without its example axis. The quantity called
    "tokens" is cut to each example's real positions.
    """

    def __init__(self, task: Task, quantities: Mapping[str, Quantity]):
        self.task, self.quantities = task, quantities
        self.indices: list[int] = []
        self.columns: dict[str, list[Tensor]] = {key: [] for key in quantities}
        self._sums: dict[str, Tensor] = {}
        self._now: Sequence[int] = ()
        self._positions_BT: Tensor | None = None

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        """Start the batch's sums."""
        self._now, self._sums, self._positions_BT = indices, {}, self.task.positions(batch)

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Add the module's part."""
        for key, quantity in self.quantities.items():
            part = quantity(name, gradient, readers)
            if part is None:
                continue
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            if key == "tokens":
                part = self._by_position(name, part, gradient)
            self._sums[key] = self._sums[key] + part if key in self._sums else part

    def end(self) -> None:
        """File the sums by example; a module that none of the batch reached adds nothing to its own."""
        self.indices += self._now
        for key in self.quantities.keys() - self._sums.keys():
            self._sums[key] = torch.zeros_like(
                next(total for other, total in self._sums.items() if other.startswith("module/"))
            )
        for key, total in self._sums.items():
            if key == "tokens" and self._positions_BT is not None:
                real_BT = self._positions_BT.bool().cpu()
                self.columns[key] += [part[..., real_BT[row]] for row, part in enumerate(total.cpu().unbind(-2))]
            else:
                self.columns[key] += total.cpu().unbind(-1)

    def restart(self) -> None:
        """Forget what was filed."""
        self.indices, self.columns = [], {key: [] for key in self.quantities}

    def tensors(self, chunk: Collection[int]) -> dict[str, Tensor]:
        """`indices [n]` of those examples of the chunk that came, and every quantity `[..., n]`; nothing where none came.

        "tokens" is `[Q, positions]`, one example after the other.
        """
        wanted = set(chunk)
        places = [place for place, index in enumerate(self.indices) if index in wanted]
        if not places:
            return {}
        join = {key: torch.cat if key == "tokens" else lambda parts, dim: torch.stack(parts, dim=dim) for key in self.columns}
        columns = {key: join[key]([parts[place] for place in places], dim=-1) for key, parts in self.columns.items()}
        return {"indices": torch.tensor([self.indices[place] for place in places]), **columns}

    def _by_position(self, name: str, part: Tensor, gradient: Gradient) -> Tensor:
        """`[..., B, T]` of `[..., B, R]`: summands put where in the sequence they are from."""
        length = None if self._positions_BT is None else self._positions_BT.shape[1]
        places = gradient.positions_BR if isinstance(gradient, Factored) else None
        if places is not None and length is not None and part.shape[-1] and int(places.max()) < length:
            return part.new_zeros((*part.shape[:-1], length)).scatter_add(-1, places.expand(part.shape), part)
        if part.shape[-1] != length:
            raise UsageError(
                f"Scores per token are not defined at {name}",
                given=f"{part.shape[-1]} positions there, {length} in the sequence",
                fix="leave it out of --modules, or score per example",
            )
        return part


def products(queries: Gradients) -> Quantity:
    """Inner products with the queries, `[Q, B]`, in their format."""
    return lambda name, gradient, readers: dot_module(queries[name], gradient.to(queries[name].dtype))


def products_at(queries: Gradients, module: str) -> Quantity:
    """Inner products with the queries at one module, `[Q, B]`."""
    everywhere = products(queries)
    return lambda name, gradient, readers: everywhere(name, gradient, readers) if name == module else None


def token_products(queries: Gradients) -> Quantity:
    """Inner products with the queries per summand of the gradient, `[Q, B, R]`."""

    def quantity(name: str, gradient: Gradient, readers: tuple[str, ...]) -> Tensor:
        if not isinstance(gradient, Factored):
            raise UsageError(
                f"Scores per token need gradients that are sums over tokens, and {name} has none",
                fix="leave it out of --modules, or score per example",
            )
        return dot_module(queries[name], gradient.to(queries[name].dtype), "token")

    return quantity


def self_products(operator: Operator) -> Quantity:
    """`<g, operator g>`: an example's influence on itself, `[B]`."""
    return operator.streaming().quadratic


def squared_norms(dtype: torch.dtype) -> Quantity:
    """`<g, g>`, `[B]`, computed in `dtype`."""

    def quantity(name: str, gradient: Gradient, readers: tuple[str, ...]) -> Tensor:
        _, n_out, n_in = gradient.shape
        parts = chunks(gradient.to(dtype), 2 * n_out * n_in)
        return torch.cat([torch.linalg.vector_norm(part.dense().w_BOI, dim=(1, 2)).square() for part in parts])

    return quantity


class Total(Sink):
    """The sum of all examples' gradients per module, `[1, O, I]`, which never forms one example's matrix."""

    def __init__(self, operands: torch.dtype, sums: torch.dtype):
        self.operands, self.dtype = operands, sums
        self.sums: dict[str, Tensor] = {}

    def restart(self) -> None:
        """Forget the sums."""
        self.sums = {}

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Add the module's part."""
        gradient = gradient.to(self.operands)
        if isinstance(gradient, Factored):
            part = gradient.g_BRO.flatten(0, 1).T @ gradient.a_BRI.flatten(0, 1)
        else:
            part = gradient.w_BOI.sum(0)
        part = part.to(self.dtype)
        self.sums[name] = self.sums[name] + part if name in self.sums else part

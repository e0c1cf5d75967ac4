"""The sink that turns the training examples' gradients into scores while the backward pass runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from whence.engine.sinks import Table
from whence.errors import UsageError
from whence.gradients import Factored, Gradient, Gradients, dot_module
from whence.tasks.base import Batch, Task


class Quantity(Protocol):
    """What a module's gradients add to a number per example: `[..., B]`, per token `[..., B, R]`, or None."""

    def __call__(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> Tensor | None: ...


class Columns(Table):
    """Adds up each quantity over the modules of a batch and files the sums by example, without their example axis.

    The quantity called "tokens" is cut to each example's real positions.
    """

    ragged = ("tokens",)

    def __init__(self, task: Task, quantities: Mapping[str, Quantity], sizes: Sequence[int] = ()):
        super().__init__()
        self.task, self.quantities, self.sizes = task, quantities, sizes
        self._sums: dict[str, Tensor] = {}
        self._positions_BT: Tensor | None = None

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        """Start the batch's sums."""
        self.indices += indices
        self._sums, self._positions_BT = {}, self.task.positions(batch)
        if "tokens" in self.quantities:
            self._check_positions(indices)

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
        for key in self.quantities:
            total = self._sums.get(key)
            if total is None:
                total = torch.zeros_like(next(each for other, each in self._sums.items() if other.startswith("module/")))
            if key == "tokens" and self._positions_BT is not None:
                real_BT = self._positions_BT.bool().cpu()
                self.file_ragged(key, [part[..., real_BT[row]] for row, part in enumerate(total.cpu().unbind(-2))])
            else:
                self.file(key, total.cpu())

    def _check_positions(self, indices: Sequence[int]) -> None:
        """Raise UsageError where the task does not say how many positions its examples have, or says two things."""
        task = type(self.task).__name__
        if self._positions_BT is None:
            raise UsageError(
                f"Scores per token need positions, and {task} gives its examples none.",
                accepted="a batch with an attention_mask [B, T], or a method positions(batch) that returns one",
                fix='per="example", or add the method to the task, with size(item) for its T',
            )
        counts = self._positions_BT.bool().sum(1).tolist()
        for index, count in zip(indices, counts, strict=True):
            if self.sizes and count != self.sizes[index]:
                raise UsageError(
                    f"{task} does not say how long example {index} is, which scores per token need.",
                    given=f"{self.sizes[index]} by size(item), {count} by the positions of its batch",
                    accepted="the same number from both",
                    fix=f'a method size(item) that returns {count} here, or per="example"',
                )

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

"""A small model, what it was trained on and what it is asked, as functions of all its weights in one vector, in float64.

`P` weights, `N` training rows, `Q` queries, `B` rows of a batch, `T` predictions of a row, `V` numbers per prediction (the
logits of a class or token, the outputs of a regression). Autograd on the vector; of the engine only its Gauss-Newton product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whence.attention import plain_attention
from whence.coverage import cover, trained
from whence.engine.products import gauss_newton, with_weights
from whence.engine.stream import encode, read
from whence.tasks.base import Batch, Task
from whence.tasks.outputs import Outputs, check_outputs

POSITIONS = 4096
"""Positions of a batch."""

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From weights `[P]` to a number and its gradient `[P]`."""


class Problem:
    """The functions; `theta` are the weights that the model has now. The model itself is copied, not touched.

    `modules` is a selector as of `fit` (None: every weight that can be trained is in the vector). Raises UsageError for a
    task whose outputs are unknown here.
    """

    def __init__(self, model: nn.Module, task: Task, train: Any, queries: Any = (), modules: str | Sequence[str] | None = None):
        self.model, self.task = copy.deepcopy(model).double().eval().requires_grad_(False), task
        self.device = next(self.model.parameters()).device
        moved = trained(model)
        chosen = {name for name, parameter in model.named_parameters() if id(parameter) in moved}
        if modules is not None:
            uses = [use for site in cover(model, modules).sites.values() for use in site.uses]
            used = {id(own) for module, layer in uses for own in layer.parameters(module)}
            chosen = {name for name, parameter in model.named_parameters() if id(parameter) in used}
        weights = {name: parameter for name, parameter in self.model.named_parameters() if name in chosen}
        self.shapes = {name: parameter.shape for name, parameter in weights.items()}
        self.theta = torch.cat([parameter.detach().flatten() for parameter in weights.values()])
        self.train = encode(task, train, model)
        self.rows = self.train.usable
        """Numbers of the training rows that have a loss."""
        self.batches = [self._batch([self.train.items[row] for row in part]) for part in self._parts()]
        self.weighted = task.encode_queries(read(queries)) if len(queries) else []
        self.asked = [
            [(self._batch([item]), weight) for item, weight in query] for query in self.weighted
        ]  # one at a time: their gradients are needed one by one
        with torch.no_grad():
            check_outputs(task, self.model, self.batches[0])

    @property
    def size(self) -> int:
        """P."""
        return len(self.theta)

    def moved_to(self, theta: Tensor) -> Problem:
        """The same problem with `theta` as the model's own weights."""
        other = copy.copy(self)
        other.theta = theta.detach()
        return other

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """The weights by name, as views of the vector."""
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def vector(self, parameters: dict[str, Tensor]) -> Tensor:
        """The vector of named weights."""
        return torch.cat([parameters[name].detach().double().flatten() for name in self.shapes])

    def at(self, theta: Tensor, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(model, *arguments)` where the model has the weights `theta`."""
        return with_weights(self.model, self.named(theta), function, *arguments)

    def outputs(self, theta: Tensor, batch: Batch) -> Outputs:
        """What the model with the weights `theta` says of a batch."""
        with plain_attention():
            return self.at(theta, self.task.outputs, batch)

    def losses(self, theta: Tensor) -> Tensor:
        """Loss of every row that has one, `[N]`."""
        return torch.cat([self.at(theta, self.task.losses, batch) for batch in self.batches])

    def row(self, row: int) -> Batch:
        """A training row as its own batch."""
        return self._batch([self.train.items[row]])

    def row_gradient(self, row: int, theta: Tensor | None = None) -> Tensor:
        """Gradient of the row's loss, `[P]`."""
        return self._gradient(lambda at: self.at(at, self.task.losses, self.row(row)).sum(), theta)

    @torch.no_grad()
    def measured(self, theta: Tensor | None = None) -> Tensor:
        """The measurement of every query, `[Q]`."""
        at = self.theta if theta is None else theta
        return torch.stack([self._measure(at, query) for query in self.asked])

    def query_gradients(self) -> Tensor:
        """Gradient of every query's measurement at the model's own weights, `[Q, P]`."""
        return torch.stack([self._gradient(lambda at, query=query: self._measure(at, query)) for query in self.asked])

    def sum_of(self, theta: Tensor, terms: Callable[[int, Batch, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Sum over batches of `terms(number, batch, theta)`, and its gradient `[P]`: one batch in memory at a time."""
        value, gradient = theta.new_zeros(()), torch.zeros_like(theta)
        for number, batch in enumerate(self.batches):
            at = theta.detach().requires_grad_()
            term = terms(number, batch, at)
            gradient += torch.autograd.grad(term, at)[0]
            value += term.detach()
        return value, gradient

    def gauss_newton(self, v_KP: Tensor) -> Tensor:
        """The Gauss-Newton matrix of the mean loss times each vector, `1/N sum_n J_n^T H_n J_n v`, never formed."""
        total = torch.zeros_like(v_KP)
        for batch in self.batches:

            def outputs(weights: dict[str, Tensor], batch: Batch = batch) -> Outputs:
                return self.outputs(weights["theta"], batch)

            total += gauss_newton(outputs, {"theta": self.theta}, {"theta": v_KP})["theta"]
        return total / len(self.rows)

    def jacobian_rows(self) -> Iterator[Tensor]:
        """`b^T J` of each training row, `[T * V, P]`, `b b^T` the loss's Hessian: their mean square is Gauss-Newton."""
        for row in self.rows:
            at = self.theta.detach().requires_grad_()
            found = self.outputs(at, self.row(row))
            counted = found.counted_BT[0]
            cotangents = torch.zeros(int(counted.sum()), found.h_BTV.shape[-1], *found.h_BTV.shape).to(at)
            for number, t in enumerate(counted.nonzero()[:, 0].tolist()):
                cotangents[number, :, 0, t] = found.root()[0, t].T
            yield torch.autograd.grad(found.h_BTV, at, cotangents.flatten(0, 1), is_grads_batched=True)[0]

    @property
    def dual_size(self) -> int:
        """Rows that `jacobian_rows` gives in all: the numbers that the loss depends on."""
        with torch.no_grad():
            found = [self.outputs(self.theta, batch) for batch in self.batches]
        return sum(int(part.counted_BT.sum()) * part.h_BTV.shape[-1] for part in found)

    def _measure(self, theta: Tensor, query: list[tuple[Batch, float]]) -> Tensor:
        return torch.stack([weight * self.at(theta, self.task.measurements, batch).sum() for batch, weight in query]).sum()

    def _gradient(self, function: Callable[[Tensor], Tensor], theta: Tensor | None = None) -> Tensor:
        at = (self.theta if theta is None else theta).detach().requires_grad_()
        return torch.autograd.grad(function(at), at)[0]

    def _parts(self) -> Iterator[list[int]]:
        part: list[int] = []
        for row in self.rows:
            if part and max(self.train.sizes[other] for other in (*part, row)) * (len(part) + 1) > POSITIONS:
                yield part
                part = []
            part.append(row)
        yield part

    def _batch(self, items: Sequence[Any]) -> Batch:
        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(self.device, torch.float64 if value.is_floating_point() else value.dtype)

        return {key: moved(value) for key, value in self.task.collate(items).items()}

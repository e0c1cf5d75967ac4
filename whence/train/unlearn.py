"""Unlearning: a copy of a model that takes steps up the loss of some text, and what it has forgotten then."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whence.engine.point import Point
from whence.engine.queries import Queries
from whence.engine.stream import device_of, to_device

Falling = Callable[[nn.Module], Tensor]
"""A number of a model, such as a log-likelihood, that a step makes smaller."""


class Unlearner:
    """A copy of a point's model in float32 or better, whose tracked weights move; the point itself stays as it is.

    It takes the memory of the model, and of four times the tracked weights: what they were, gradients, Adam's two moments.
    """

    def __init__(self, point: Point, names: Sequence[str]):
        uses = [use for site in point.cover(names).sites.values() for use in site.uses]
        tracked = {id(weight) for module, layer in uses for weight in layer.parameters(module)}
        chosen = [name for name, weight in point.model.named_parameters() if id(weight) in tracked]
        self.start, self.model = point, copy.deepcopy(point.model).to(point.sums).eval().requires_grad_(False)
        weights = dict(self.model.named_parameters())
        self.weights = [weights[name].requires_grad_() for name in chosen]
        self.before = [weight.detach().clone() for weight in self.weights]

    def after(self, steps: Iterable[Falling], learning_rate: float) -> Point:
        """Where steps of Adam (Kingma and Ba 2015), one down each number, lead to from the point; until the next call."""
        with torch.no_grad():
            for weight, before in zip(self.weights, self.before, strict=True):
                weight.copy_(before)
        adam = torch.optim.Adam(self.weights, lr=learning_rate, betas=(0.9, 0.999))
        for falling in steps:
            adam.zero_grad()
            with torch.enable_grad():
                falling(self.model).backward()
            adam.step()
        return self.start.at(self.model)

    def rows(self, rows: Sequence[int], epochs: int, batch_size: int, seed: int) -> Iterable[Falling]:
        """Their mean log-likelihood, batch by batch, in an order that the seed decides."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for batch in torch.randperm(len(rows), generator=generator).split(batch_size):
                items = [self.start.examples.items[rows[place]] for place in batch.tolist()]
                yield lambda model, items=items: -self.start.task.losses(model, self._batch(items)).mean()

    def query(self, queries: Queries, number: int, steps: int) -> Iterable[Falling]:
        """What is measured of a query, again and again."""
        items, weights = zip(*queries.weighted[number], strict=True)

        def measured(model: nn.Module) -> Tensor:
            values = self.start.task.measurements(model, self._batch(items))
            return values @ torch.tensor(weights).to(values)

        return [measured] * steps

    def _batch(self, items: Sequence[Any]) -> Any:
        return to_device(self.start.task.collate(items), device_of(self.model))

"""What an oracle is given: a small trained model as plain functions of one vector of weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.attention import plain_attention
from whence.fitting import fit
from whence.settings import Score
from whence.tasks.base import Task
from whence.train.replay import History, Snapshot
from whence.validate.problem import Problem


@dataclass(frozen=True)
class Case:
    """A trained model, its rows and queries; `P` tracked weights, `N` rows, `Q` queries, everything in float64."""

    model: nn.Module
    task: Task
    rows: Sequence[Any]
    queries: Sequence[Any]
    training: History | None = None
    modules: str | Sequence[str] | None = None

    @functools.cached_property
    def problem(self) -> Problem:
        """Losses, measurements and curvature as functions of the weights of the tracked modules."""
        return Problem(self.model, self.task, self.rows, self.queries, self.modules or self.task.default_modules)

    @functools.cached_property
    def g_NP(self) -> Tensor:
        """Gradients of each row's log-likelihood."""
        return torch.stack([-self.problem.row_gradient(row) for row in range(len(self.rows))])

    @functools.cached_property
    def m_QP(self) -> Tensor:
        """Gradients of each query's measurement."""
        return self.problem.query_gradients()

    @functools.cached_property
    def gauss_newton_PP(self) -> Tensor:
        """The Gauss-Newton matrix of the mean loss."""
        return self.problem.gauss_newton(torch.eye(self.problem.size).double())

    @functools.cached_property
    def hessian_PP(self) -> Tensor:
        """The Hessian of the mean loss."""
        with plain_attention():
            mean = lambda theta: self.problem.losses(theta).mean()  # noqa: E731
            return torch.autograd.functional.hessian(mean, self.problem.theta, vectorize=True)  # type: ignore[return-value]

    @functools.cached_property
    def mean_of_factors(self) -> float:
        """Mean eigenvalue of EK-FAC factors, whose labels are drawn once: what methods that form no matrix damp in units of."""
        chosen = self.modules or self.task.default_modules
        return fit(self.model, self.task, self.rows, modules=chosen, precision=Score().precision).mean_eigenvalue

    def spans(self) -> dict[str, slice]:
        """Where each weight stands in the vector of all."""
        sizes = [shape.numel() for shape in self.problem.shapes.values()]
        ends = np.cumsum(sizes).tolist()
        return {name: slice(end - size, end) for name, end, size in zip(self.problem.shapes, ends, sizes, strict=True)}

    def at_checkpoints(self) -> Iterator[tuple[Snapshot, Case]]:
        """The same at the weights of each checkpoint, oldest first."""
        assert self.training is not None
        for checkpoint in self.training.checkpoints:
            model = copy.deepcopy(self.model)
            checkpoint.load(model)
            yield checkpoint, replace(self, model=model)


Oracle = Callable[..., np.ndarray]
"""`oracle(case, **settings)`, with the recipe's settings: what `values` of the method's scores should be, `[Q, N]`."""

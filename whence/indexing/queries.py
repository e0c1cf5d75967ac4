"""Queries, projected to meet the rows of an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whence.capture import Capture
from whence.engine.partition import run_chunk
from whence.engine.stream import Sink, stream
from whence.errors import UsageError
from whence.gradients import Gradient, chunks
from whence.indexing.projection import Projection, project
from whence.operators.base import Operator
from whence.tasks.base import Batch, Task

Weighted = Sequence[Sequence[tuple[Any, float]]]
"""Queries as weighted sums of items."""


class _Queries(Sink):
    """Adds up the projected `operator @ gradient` of each query's items."""

    def __init__(self, owners: Sequence[int], queries: int, projection: Projection, operator: Operator | None, like: Tensor):
        self.owners, self.queries, self.operator, self.like = owners, queries, operator, like
        self.projection = projection.to(like)
        self.places = self.projection.places
        self.restart()

    def restart(self) -> None:
        """Back to zero."""
        self.rows_QD = self.like.new_zeros(self.queries, sum(self.projection.widths))
        self.measured = torch.zeros(self.queries, dtype=torch.float64)

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        """Remember whose items come."""
        self._owners = torch.tensor([self.owners[index] for index in indices], device=self.like.device)

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Apply the operator, project, and add to the query."""
        gradient = gradient.to(self.like.dtype)
        m_O, m_I = self.projection.out[name], self.projection.into[name]
        if self.operator is None:
            parts = [project(gradient, m_O, m_I)]
        else:
            n_out, n_in = gradient.shape[1:]
            applied = ((self.operator @ {name: part})[name] for part in chunks(gradient, 3 * n_out * n_in))
            parts = [project(part, m_O, m_I) for part in applied]
        self.rows_QD[:, self.places[name]].index_add_(0, self._owners, torch.cat(parts).flatten(1))


def project_queries(
    capture: Capture,
    task: Task,
    queries: Weighted,
    projection: Projection,
    operator: Operator | None,
    *,
    like: Tensor,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Rows `[Q, D]` of the queries and what was measured `[Q]`; `operator` None stands for the identity."""
    items = [item for query in queries for item, _ in query]
    owners = [number for number, query in enumerate(queries) for _ in query]
    weights = torch.tensor([weight for query in queries for _, weight in query], dtype=torch.float64)
    sizes = [task.size(item) for item in items]
    if not all(sizes):
        raise UsageError(
            f"Query {owners[sizes.index(0)]} has no token to measure", accepted="a completion of one token or more"
        )
    sink = _Queries(owners, len(queries), projection, operator, like)

    def objective(model: nn.Module, batch: Batch, indices: Sequence[int]) -> Tensor:
        values = task.measurements(model, batch)
        weighted = values * weights[list(indices)].to(values)
        sink.measured.index_add_(0, torch.tensor([owners[index] for index in indices]), weighted.detach().cpu().double())
        return weighted

    def run(batches: list[list[int]]) -> None:
        stream(capture, task, items, batches, objective, sink, advance)

    run_chunk(range(len(items)), sizes, batch_tokens, run, sink.restart)
    return sink.rows_QD, sink.measured

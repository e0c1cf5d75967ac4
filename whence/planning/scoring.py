"""The two passes of `score`, rehearsed apart: the queries' gradients serve batches of rows of any shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from whence.engine.partition import data_chunks
from whence.engine.passes import ByChunk, run_pass
from whence.engine.point import Point
from whence.engine.queries import Preconditioned, encode_queries, precondition
from whence.operators import Operator
from whence.precision import Precision, kept_as, multiplying
from whence.scoring.sinks import Columns, products
from whence.store.memory import Memory
from whence.tasks.base import Task


def ask(
    model: nn.Module,
    task: Task,
    queries: Sequence[Any],
    operator: Operator,
    rank: int | None,
    precision: Precision,
    batch_tokens: int,
) -> Preconditioned:
    """Rehearse what is asked, as stage "queries"; returns what is kept of it."""
    point, asked = Point(model, task, batch_tokens=batch_tokens), encode_queries(task, queries)
    kept = kept_as(precision.operands("scores", point.dtype), point.device)
    with multiplying(precision.products, point.device):
        return precondition(point, asked, point.cover(operator.names).sites, operator, rank=rank, kept=kept)


def score_rows(
    model: nn.Module, task: Task, rows: Sequence[Any], queries: Preconditioned, precision: Precision, batch_tokens: int
) -> None:
    """Rehearse a pass over the rows, as stage "score"."""
    point = Point(model, task, rows, batch_tokens=batch_tokens)
    examples, sites = point.examples, point.cover(list(queries.gradients)).sites
    sink = Columns(task, {"raw": products(queries.gradients)}, examples.sizes)
    saved = ByChunk(data_chunks(examples.usable, examples.sizes, 1), Memory(), "chunk")
    with multiplying(precision.products, point.device):
        run_pass(point, sites, examples, point.likelihood, sink, "score", saved)

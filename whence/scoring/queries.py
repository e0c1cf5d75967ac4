"""Gradients of the queries' measurements, multiplied with the operator once and for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whence.capture import Capture
from whence.errors import UsageError
from whence.gradients import Dense, Factored, Gradient, Gradients
from whence.linalg.lowrank import randomized_svd
from whence.operators.base import Operator
from whence.partition import run_chunk
from whence.stream import Sink, stream
from whence.tasks.base import Batch, Task

CHUNK_BYTES = 2**30
"""Bound on the memory of the full-rank gradients that are processed at a time."""


@dataclass(frozen=True)
class Preconditioned:
    """`operator @ gradient` of every query; `[Q]` each: what was measured, the norm, the energy that a low rank keeps."""

    gradients: dict[str, Gradient]
    measured: Tensor
    norms: Tensor
    energy: Tensor

    def __len__(self) -> int:
        return len(self.measured)


class _Collect(Sink):
    """Adds up the gradients of each query's items, formed."""

    def __init__(self, queries: int, owners: Sequence[int], dtype: torch.dtype):
        self.queries, self.owners, self.dtype = queries, owners, dtype
        self.gradients: dict[str, Tensor] = {}
        self._rows: list[int] = []

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        self._rows = [self.owners[index] for index in indices]

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        w_BOI = gradient.to(self.dtype).dense().w_BOI
        if name not in self.gradients:
            self.gradients[name] = w_BOI.new_zeros((self.queries, *w_BOI.shape[1:]))
        self.gradients[name].index_add_(0, torch.tensor(self._rows, device=w_BOI.device), w_BOI)


def precondition(
    capture: Capture,
    task: Task,
    queries: Sequence[Sequence[tuple[Any, float]]],
    operator: Operator,
    *,
    rank: int | None,
    dtype: torch.dtype,
    kept: torch.dtype,
    batch_tokens: int,
    seed: int,
    together: bool,
    advance: Callable[[int], None],
) -> Preconditioned:
    """Measure every query and multiply its gradient with the operator, in `dtype`; keep it in `kept`, at rank `rank`.

    A query is a weighted sum of items. With `together` all queries are added up to one before the operator is applied.
    """
    sizes = [sum(task.size(item) for item, _ in query) for query in queries]
    if empty := [number for number, size in enumerate(sizes) if not size]:
        raise UsageError(f"Query {empty[0]} has no token to measure", accepted="a completion of one token or more", code=6)
    per_query = sum(math.prod(site.shape) for site in capture.sites.values()) * torch.finfo(dtype).bits // 8
    limit = max(1, CHUNK_BYTES // per_query)
    order: list[int] = []
    parts: list[Preconditioned] = []
    totals: dict[str, Tensor] = {}

    def run(batches: list[list[int]]) -> None:
        for chosen in (batch[start : start + limit] for batch in batches for start in range(0, len(batch), limit)):
            gradients, measured = _measure(capture, task, [queries[number] for number in chosen], dtype)
            if together:
                for name, w_QOI in gradients.items():
                    w_QOI = w_QOI.sum(0, keepdim=True)
                    totals[name] = totals[name] + w_QOI if name in totals else w_QOI
                parts.append(Preconditioned({}, measured, measured, measured))
            else:
                parts.append(_apply(operator, gradients, measured, rank, kept, seed))
            order.extend(chosen)
            advance(sum(sizes[number] for number in chosen))

    def undo() -> None:
        order.clear()
        parts.clear()
        totals.clear()

    run_chunk(range(len(queries)), sizes, batch_tokens, run, undo)
    if together:
        return _apply(operator, totals, torch.cat([part.measured for part in parts]).sum(0, keepdim=True), rank, kept, seed)
    return _joined(parts, torch.tensor(order).argsort())


def _measure(
    capture: Capture, task: Task, queries: Sequence[Sequence[tuple[Any, float]]], dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """The queries' gradients, formed, and what was measured."""
    items = [item for query in queries for item, _ in query]
    owners = [number for number, query in enumerate(queries) for _ in query]
    weights = torch.tensor([weight for query in queries for _, weight in query], dtype=torch.float64)
    measured = torch.zeros(len(queries), dtype=torch.float64)

    def objective(model: nn.Module, batch: Batch, indices: Sequence[int]) -> Tensor:
        values = task.measurements(model, batch)
        weighted = values * weights[list(indices)].to(values)
        measured.index_add_(0, torch.tensor([owners[index] for index in indices]), weighted.detach().cpu().double())
        return weighted

    sink = _Collect(len(queries), owners, dtype)
    stream(capture, task, items, [range(len(items))], objective, sink, lambda positions: None)
    like = next(iter(sink.gradients.values()))
    unreached = {name: site.shape for name, site in capture.sites.items() if name not in sink.gradients}  # experts not visited
    return sink.gradients | {name: like.new_zeros(len(queries), *shape) for name, shape in unreached.items()}, measured


def _apply(
    operator: Operator, gradients: dict[str, Tensor], measured: Tensor, rank: int | None, kept: torch.dtype, seed: int
) -> Preconditioned:
    applied: Gradients = operator @ {name: Dense(w_QOI) for name, w_QOI in gradients.items()}
    square, lost, result = torch.zeros(len(measured)), torch.zeros(len(measured)), {}
    for name, gradient in applied.items():
        w_QOI = gradient.dense().w_BOI
        energy = w_QOI.square().sum((1, 2)).cpu()
        square = square + energy
        if rank is None or rank * (w_QOI.shape[1] + w_QOI.shape[2]) >= w_QOI[0].numel():
            result[name] = Dense(w_QOI.to(kept))
            continue
        g_QRO, a_QRI, share = randomized_svd(w_QOI, rank, seed=seed)
        lost = lost + energy * (1 - share.cpu())
        result[name] = Factored(g_QRO, a_QRI).to(kept)
    tiny = torch.finfo(torch.float32).tiny
    return Preconditioned(result, measured, square.sqrt(), 1 - lost / square.clamp(min=tiny))


def _joined(parts: Sequence[Preconditioned], place: Tensor) -> Preconditioned:
    """The parts one after the other, in the order that `place` gives."""
    gradients: dict[str, Gradient] = {}
    for name in parts[0].gradients:
        pieces = [part.gradients[name] for part in parts]
        here = place.to(pieces[0].g_BRO.device if isinstance(pieces[0], Factored) else pieces[0].w_BOI.device)
        if isinstance(pieces[0], Dense):
            gradients[name] = Dense(torch.cat([piece.dense().w_BOI for piece in pieces])[here])
        else:
            factored = [piece for piece in pieces if isinstance(piece, Factored)]
            g_QRO, a_QRI = torch.cat([p.g_BRO for p in factored]), torch.cat([p.a_BRI for p in factored])
            gradients[name] = Factored(g_QRO[here], a_QRI[here])
    columns = {key: torch.cat([getattr(part, key) for part in parts])[place] for key in ("measured", "norms", "energy")}
    return Preconditioned(gradients, **columns)

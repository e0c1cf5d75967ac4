"""Gradients of the queries' measurements, multiplied with the operator once and for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whence import dist
from whence.capture import Capture
from whence.engine.partition import run_share
from whence.engine.stream import Objective, Sink, stream
from whence.errors import UsageError
from whence.gradients import Dense, Factored, Gradient
from whence.linalg.lowrank import randomized_svd
from whence.operators.base import Operator, Streaming
from whence.scoring.sinks import Total
from whence.tasks.base import Batch, Task

CHUNK_BYTES = 2**30
"""Bound on the memory of one module's full-rank gradients that are processed at a time."""


@dataclass(frozen=True)
class Preconditioned:
    """`operator @ gradient` of every query; `[Q]` each: what was measured, the norm, the energy that a low rank keeps."""

    gradients: dict[str, Gradient]
    measured: Tensor
    norms: Tensor
    energy: Tensor

    def __len__(self) -> int:
        return len(self.measured)


class _Kept:
    """The preconditioned gradients of all queries, at full or at low rank, in the format they are kept in."""

    def __init__(self, queries: int, rank: int | None, kept: torch.dtype, seed: int):
        self.queries, self.rank, self.kept, self.seed = queries, rank, kept, seed
        self.restart()

    def restart(self) -> None:
        """Forget them."""
        self.parts: dict[str, tuple[Tensor, ...]] = {}
        self.square, self.lost = torch.zeros(2, self.queries, dtype=torch.float64)

    def put(self, name: str, rows: Sequence[int], w_QOI: Tensor) -> None:
        """Keep the gradients of the queries `rows` at one module."""
        square = torch.linalg.vector_norm(w_QOI, dim=(1, 2)).cpu().double().square()
        self.square[list(rows)] += square
        if self.rank is None or self.rank * (w_QOI.shape[1] + w_QOI.shape[2]) >= w_QOI[0].numel():
            parts: tuple[Tensor, ...] = (w_QOI,)
        else:
            g_QRO, a_QRI, share = randomized_svd(w_QOI, self.rank, seed=self.seed)
            parts = (g_QRO, a_QRI)
            self.lost[list(rows)] += square * (1 - share.cpu())
        parts = tuple(part.to(self.kept).contiguous() for part in parts)
        if list(rows) == list(range(self.queries)):
            self.parts[name] = parts
            return
        if name not in self.parts:
            self.parts[name] = tuple(part.new_zeros((self.queries, *part.shape[1:])) for part in parts)
        for tensor, part in zip(self.parts[name], parts, strict=True):
            tensor[list(rows)] = part

    def join(self) -> None:
        """Bring together what the processes have: each the gradients of its own queries, and zeros for the others."""
        found = {f"{number}/{name}": part for name, parts in self.parts.items() for number, part in enumerate(parts)}
        parts: dict[str, dict[int, Tensor]] = {}
        for key, tensor in dist.add_up(found).items():
            number, _, name = key.partition("/")
            parts.setdefault(name, {})[int(number)] = tensor
        self.parts = {name: tuple(pieces[number] for number in sorted(pieces)) for name, pieces in parts.items()}
        about = dist.add_up({"square": self.square, "lost": self.lost})
        self.square, self.lost = about["square"], about["lost"]

    def result(self, measured: Tensor) -> Preconditioned:
        """All of them, with what they are worth."""
        gradients = {name: Dense(*parts) if len(parts) == 1 else Factored(*parts) for name, parts in self.parts.items()}
        energy = 1 - self.lost / self.square.clamp(min=torch.finfo(torch.float32).tiny)
        return Preconditioned(gradients, measured, self.square.sqrt(), energy)


class _Apply(Sink):
    """Multiplies each item's gradient with the operator as it arises, and adds up the items of a query."""

    def __init__(self, streaming: Streaming, rows: Sequence[int], owners: Sequence[int], kept: _Kept):
        self.streaming, self.rows, self.owners, self.kept = streaming, rows, owners, kept

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        w_QOI = self.streaming.apply(name, gradient, readers).w_BOI
        if len(self.owners) > len(self.rows):
            owners = torch.tensor(self.owners, device=w_QOI.device)
            w_QOI = w_QOI.new_zeros((len(self.rows), *w_QOI.shape[1:])).index_add_(0, owners, w_QOI)
        self.kept.put(name, self.rows, w_QOI)


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
    Of several processes (`whence.dist`) each does this for some of the queries, and all get the result.
    """
    sizes = [sum(task.size(item) for item, _ in query) for query in queries]
    if empty := [number for number, size in enumerate(sizes) if not size]:
        raise UsageError(f"Query {empty[0]} has no token to measure", accepted="a completion of one token or more", code=6)
    largest = max(math.prod(site.shape) for site in capture.sites.values()) * torch.finfo(dtype).bits // 8
    limit = max(1, CHUNK_BYTES // largest)
    streaming, device = operator.streaming(), next(capture.model.parameters()).device
    measured = torch.zeros(len(queries), dtype=torch.float64)
    result, total = _Kept(1 if together else len(queries), rank, kept, seed), Total(dtype, dtype)

    def run(batches: list[list[int]], tell: Callable[[int], None]) -> None:
        for chosen in (batch[start : start + limit] for batch in batches for start in range(0, len(batch), limit)):
            items = [item for number in chosen for item, _ in queries[number]]
            owners = [place for place, number in enumerate(chosen) for _ in queries[number]]
            weights = torch.tensor([weight for number in chosen for _, weight in queries[number]], dtype=torch.float64)
            objective = _measuring(task, weights, torch.tensor(chosen)[owners], measured)
            sink = total if together else _Apply(streaming, chosen, owners, result)
            stream(capture, task, items, [range(len(items))], objective, sink, lambda positions: None)
            tell(sum(sizes[number] for number in chosen))

    def undo() -> None:
        measured.zero_()
        total.restart()
        result.restart()

    run_share([range(len(queries))], sizes, batch_tokens, run, undo, advance, most=limit)
    measured = dist.add_up({"measured": measured})["measured"]
    result.join()
    if together:
        measured = measured.sum(0, keepdim=True)
        for name, w_OI in dist.add_up(total.sums).items():
            result.put(name, [0], streaming.apply(name, Dense(w_OI.unsqueeze(0)), (name,)).w_BOI)
    for name, site in capture.sites.items():
        if name not in result.parts:  # an expert that no query's token visits
            result.put(name, range(result.queries), torch.zeros(result.queries, *site.shape, dtype=dtype, device=device))
    return result.result(measured)


def _measuring(task: Task, weights: Tensor, owners: Tensor, measured: Tensor) -> Objective:
    """The items' weighted measurements, which are also added up in `measured`, query by query."""

    def objective(model: nn.Module, batch: Batch, indices: Sequence[int]) -> Tensor:
        values = task.measurements(model, batch)
        weighted = values * weights[list(indices)].to(values)
        measured.index_add_(0, owners[list(indices)], weighted.detach().cpu().double())
        return weighted

    return objective

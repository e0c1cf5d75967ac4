"""What is asked of a model: gradients of the queries' measurements, multiplied with an operator once and for all.

Collect, apply, compress: a blockwise operator is applied as gradients arise, and then nothing but its result is kept; any other
gets the gradients of all queries once their pass is over, and may run the model itself.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from whence import dist
from whence.coverage import Site
from whence.engine.passes import Unsaved, run_pass
from whence.engine.sinks import Total
from whence.engine.stream import Examples, Owner, Sink, everybody, identify, one_for_each, read
from whence.errors import NumericalError, UsageError
from whence.gradients import Dense, Factored, Gradient
from whence.linalg.lowrank import randomized_svd
from whence.operators import Identity, Operator, Streaming
from whence.store.scores import describe_queries
from whence.tasks.base import Batch, Task

if TYPE_CHECKING:
    from whence.engine.point import Point

CHUNK_BYTES = 2**30
"""Bound on the memory of one module's full-rank gradients that are processed at a time."""


@dataclass(frozen=True)
class Queries(Examples):
    """Queries, each a weighted sum of items: `items` has those of one query after those of the other."""

    weighted: Sequence[Sequence[tuple[Any, float]]] = ()
    table: Mapping[str, list[Any]] = field(default_factory=dict)
    """What the table of queries says about each: id, text and what that is made of, tokens measured."""

    @functools.cached_property
    def owners(self) -> list[int]:
        """The query of each item."""
        return [number for number, query in enumerate(self.weighted) for _ in query]

    @functools.cached_property
    def weights(self) -> list[float]:
        """Of each item."""
        return [weight for query in self.weighted for _, weight in query]

    def items_of(self, batch: Sequence[int]) -> Sequence[int]:
        """The places in `items` of these queries."""
        starts = [0, *itertools.accumulate(map(len, self.weighted))]
        return [place for number in batch for place in range(starts[number], starts[number + 1])]

    def take(self, rows: slice) -> Queries:
        """Some of them, without their table."""
        weighted = self.weighted[rows]
        items = [item for query in weighted for item, _ in query]
        return replace(self, items=items, ids=self.ids[rows], sizes=self.sizes[rows], weighted=weighted, table={})


def encode_queries(task: Task, data: Any, model: nn.Module | None = None) -> Queries:
    """Read, encode and describe queries. Raises UsageError where there are none, or one has nothing to measure."""
    rows = dist.from_first(read(data))
    if not len(rows):
        raise UsageError("There are no queries", accepted="one query or more")
    weighted = task.encode_queries(rows)
    table = describe_queries(rows, task, weighted)
    sizes = tuple(sum(task.size(item) for item, _ in query) for query in weighted)
    if not all(sizes):
        raise UsageError(
            f"Query {sizes.index(0)} has no token to measure", accepted="a completion of one token or more", code=6
        )
    items = [item for query in weighted for item, _ in query]
    if model is not None:
        task.examine(model, items, [f"query {name}" for name, query in zip(table["id"], weighted, strict=True) for _ in query])
    return Queries(items, tuple(table["id"]), rows, sizes, identify(rows)[1], weighted, table)


@dataclass(frozen=True)
class Preconditioned:
    """`operator @ gradient` of every query, and what was measured of it, `[Q]`.

    `worth_Q2` are the squared norms, and what of them a low rank lost, where gradients are compressed; else the gradients tell.
    """

    gradients: dict[str, Gradient]
    measured: Tensor
    worth_Q2: Tensor | None

    def columns(self) -> dict[str, Any]:
        """What goes into the table of queries: also the norm, and the energy that a low rank keeps."""
        worth_Q2 = self.worth_Q2
        if worth_Q2 is None:
            worth_Q2 = _summed(_worth(gradient.dense().w_BOI) for gradient in self.gradients.values())
        square, lost = worth_Q2.unbind(1)
        energy = 1 - lost / square.clamp(min=torch.finfo(torch.float32).tiny)
        return {"measured": self.measured, "norm": square.sqrt(), "energy": energy}


def precondition(
    point: Point,
    queries: Queries,
    sites: Mapping[str, Site],
    operator: Operator,
    *,
    rank: int | None = None,
    kept: torch.dtype | None = None,
    seed: int = 0,
    together: bool = False,
    name: str = "queries",
) -> Preconditioned:
    """Measure every query and multiply its gradient with the operator; keep it in the format `kept`, at rank `rank`.

    With `together` all queries are added up to one before the operator is applied. Of several processes (`whence.dist`) each
    does this for some of the queries, and all get the result. Raises NumericalError where what is compressed is not finite.
    """
    dtype, count = point.sums, 1 if together else len(queries)
    compress = None if rank is None and kept is None else Compression(rank, kept or dtype, seed)
    result, whole = QueryGradients(count, compress), QueryGradients(count)
    streaming = operator.streaming(point.like) if operator.blockwise else None
    if together:
        inner: Sink = Total(dtype, dtype, point.device)
    elif streaming is not None:
        inner = _ByQuery(queries, streaming, result, sites)
    else:
        inner = _ByQuery(queries, Identity().streaming(point.like), whole, sites)
    sink = _Measured(point.task, queries, inner)
    largest = max(math.prod(site.shape) for site in sites.values()) * torch.finfo(dtype).bits // 8
    every = Unsaved(range(len(queries)))
    run_pass(point, sites, queries, sink.objective, sink, name, every, most=max(1, CHUNK_BYTES // largest))
    waiting = whole.gradients  # what the operator has not been applied to
    if isinstance(inner, Total):
        waiting = {name: Dense(w_OI.unsqueeze(0)) for name, w_OI in inner.totals.items() if name != "examples"}
    for name, site in sites.items():
        if name not in waiting and name not in result.parts:  # an expert that no query's token visits
            waiting[name] = Dense(torch.zeros(count, *site.shape, dtype=dtype, device=point.device))
    if streaming is not None:
        applied = {name: streaming.apply(name, gradient, (name,)) for name, gradient in waiting.items()}
    else:
        applied = operator @ waiting
    for name, gradient in applied.items():
        result.put(name, range(count), gradient.dense().w_BOI)
    worth_Q2 = _summed(parts[-1] for parts in result.parts.values()) if compress else None
    if worth_Q2 is not None:
        refuse_infinite(worth_Q2)
    measured = sink.measured.sum(0, keepdim=True) if together else sink.measured
    return Preconditioned(result.gradients, measured, worth_Q2)


def refuse_infinite(numbers: Tensor) -> None:
    """Raise NumericalError where numbers made from queries' gradients, on the host, are not finite."""
    if not np.isfinite(numbers.numpy()).all():
        raise NumericalError("A query's gradient is not finite", fix="look at the query's text, or use float32")


@dataclass(frozen=True)
class Compression:
    """Matrices at rank `rank` (None: as they are) in the format `kept`, and what they are worth, `[Q, 2]`."""

    rank: int | None
    kept: torch.dtype
    seed: int

    def __call__(self, w_QOI: Tensor) -> tuple[Tensor, ...]:
        """The matrices or their two factors, and what they are worth."""
        factors, share = (w_QOI,), None
        if self.rank is not None and self.rank * (w_QOI.shape[1] + w_QOI.shape[2]) < w_QOI[0].numel():
            *factors, share = randomized_svd(w_QOI, self.rank, seed=self.seed)
        return (*(factor.to(self.kept).contiguous() for factor in factors), _worth(w_QOI, share))


def _worth(w_QOI: Tensor, share: Tensor | None = None) -> Tensor:
    """Of each matrix the squared norm, and what of it is lost where only a `share [Q]` is kept: `[Q, 2]` in float64."""
    square = torch.linalg.vector_norm(w_QOI, dim=(1, 2)).double().square()
    return torch.stack([square, torch.zeros_like(square) if share is None else square * (1 - share)], 1)


def _summed(worth: Iterable[Tensor]) -> Tensor:
    """The sum over the modules; brought to the host together, since each transfer waits for the device."""
    return torch.stack(list(worth)).cpu().cumsum(0)[-1]


class QueryGradients:
    """The gradients of `count` queries at each module, as they are or compressed."""

    def __init__(self, count: int, compress: Compression | None = None):
        self.count, self.compress = count, compress
        self.restart()

    def restart(self) -> None:
        """Forget them."""
        self.parts: dict[str, tuple[Tensor, ...]] = {}

    def put(self, name: str, rows: Sequence[int], w_QOI: Tensor) -> None:
        """Keep the gradients of the queries `rows` at one module."""
        parts = self.compress(w_QOI) if self.compress else (w_QOI.contiguous(),)
        if list(rows) == list(range(self.count)):
            self.parts[name] = parts
            return
        if name not in self.parts:
            self.parts[name] = tuple(part.new_zeros((self.count, *part.shape[1:])) for part in parts)
        for tensor, part in zip(self.parts[name], parts, strict=True):
            tensor[list(rows)] = part

    def merge(self) -> None:
        """Bring together what the processes have: each the gradients of its own queries, and zeros for the others."""
        if dist.world() == 1:
            return
        order = dict.fromkeys(name for names in dist.from_all(list(self.parts)) for name in names)
        found = {f"{number}/{name}": part for name, parts in self.parts.items() for number, part in enumerate(parts)}
        parts: dict[str, dict[int, Tensor]] = {}
        for key, tensor in dist.add_up(found).items():
            number, _, name = key.partition("/")
            parts.setdefault(name, {})[int(number)] = tensor
        # in the order of one process, in which what they are worth is added up
        self.parts = {name: tuple(parts[name][number] for number in sorted(parts[name])) for name in order}

    @property
    def gradients(self) -> dict[str, Gradient]:
        """Those of each module."""
        factors = {name: parts[:-1] if self.compress else parts for name, parts in self.parts.items()}
        return {name: Dense(*parts) if len(parts) == 1 else Factored(*parts) for name, parts in factors.items()}


class _Measured(Sink):
    """Adds up what is measured of each query, and hands the gradients of its items on."""

    def __init__(self, task: Task, queries: Queries, inner: Sink):
        self.task, self.queries, self.inner = task, queries, inner
        self.inputs, self.begin, self.receive, self.end = inner.inputs, inner.begin, inner.receive, inner.end

    def objective(self, model: nn.Module, batch: Batch, indices: Sequence[int]) -> Tensor:
        """The items' weighted measurements, which are also added up query by query."""
        values = one_for_each(self.task.measurements(model, batch), len(indices), self.task)
        weighted = values * values.new_tensor([self.queries.weights[index] for index in indices])
        owners = torch.tensor([self.queries.owners[index] for index in indices])
        self.measured.index_add_(0, owners, weighted.detach().cpu().double())
        return weighted

    def load(self, state: Mapping[str, Tensor], owner: Owner = everybody) -> None:
        self.measured = torch.zeros(len(self.queries), dtype=torch.float64)
        self.inner.load(state, owner)

    def merge(self, owner: Owner = everybody) -> None:
        self.measured = dist.add_up({"measured": self.measured})["measured"]
        self.inner.merge(owner)


class _ByQuery(Sink):
    """Maps the gradients of items as they arise, and adds them up to those of the queries."""

    def __init__(self, queries: Queries, streaming: Streaming, target: QueryGradients, sites: Mapping[str, Site]):
        self.queries, self.streaming, self.target = queries, streaming, target
        self.inputs = streaming.ahead(name for name, site in sites.items() if site.reads_columns)

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        owners = [self.queries.owners[index] for index in indices]
        self._rows = list(dict.fromkeys(owners))
        place = {number: place for place, number in enumerate(self._rows)}
        self._owners = [place[number] for number in owners]

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        w_QOI = self.streaming.apply(name, gradient, readers).dense().w_BOI
        if len(self._owners) > len(self._rows):
            owners = torch.tensor(self._owners, device=w_QOI.device)
            w_QOI = w_QOI.new_zeros((len(self._rows), *w_QOI.shape[1:])).index_add_(0, owners, w_QOI)
        self.target.put(name, self._rows, w_QOI)

    def load(self, state: Mapping[str, Tensor], owner: Owner = everybody) -> None:
        self.target.restart()

    def merge(self, owner: Owner = everybody) -> None:
        self.target.merge()
